"""`make bench`: what many adapters cost, what the front end costs, what adapter slots cost, and where a step's time goes."""
