"""`fat5convert push`: a FAT5 folder becomes a repo on the Hub, complete, checked and described by a card."""
