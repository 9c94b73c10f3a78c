"""Files: written completely, downloaded, unpacked."""
