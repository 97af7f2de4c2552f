"""What leaves with a merged model: its card and its upload, and answers to check a copy or a server by."""
