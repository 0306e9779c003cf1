"""What measuring shares: problems of one layer, paired timing, environment, kept bytes, models' shapes."""
