"""Where the clients run. ``local`` is in this process; engines for clusters and sites join through the same seam."""
