"""IJB-B and IJB-C: templates of many images, verified (1:1) and searched for (1:N)."""
