"""What people read: the terminal and the HTML file."""
