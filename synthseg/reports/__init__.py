"""What people look at after a run: tables of volumes, pictures, the HTML report."""
