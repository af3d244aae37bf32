"""What a router did over a text, token by token: recorders of every kind of model, and the folder they write."""
