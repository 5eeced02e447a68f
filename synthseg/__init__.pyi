from synthseg.api import segment as segment
from synthseg.inference import Segmentation as Segmentation
from synthseg.networks.checkpoint import load_model as load_model
from synthseg.volume import Volume as Volume
from synthseg.volume import load_volume as load_volume

__version__: str
