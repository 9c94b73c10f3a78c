"""Files: whole or not there, from the net, out of archives."""
