"""`xact bench`: how fast things are on this machine, beside other ways to compute the same."""
