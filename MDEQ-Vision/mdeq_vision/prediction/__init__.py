"""What a trained image model says of pictures: in Python, and by the tools classify and segment."""
