"""What layers are given and give while their network runs."""
