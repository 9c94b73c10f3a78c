"""What lets a run survive kills, full disks, bad samples and numbers that are not finite."""
