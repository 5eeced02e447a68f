"""Networks: a MONAI body between our stem and head (backbone.py), and the file that holds a trained one."""
