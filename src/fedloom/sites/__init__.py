"""Training across institutions: a server and sites, each in its own process, with messages between them."""
