"""Bills of materials: what packages an image has, told by the databases in its layers."""
