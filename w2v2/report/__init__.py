"""A run's folder as one HTML page: charts, tables and a verdict, without scripts and without the network."""
