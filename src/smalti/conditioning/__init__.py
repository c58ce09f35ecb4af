"""What a picture should be of: text encoders, and what is said of a picture to one."""
