"""What the parts cost, each figure measured beside what it is compared with."""
