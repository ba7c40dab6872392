"""Ray for every room: start or join a cluster, ask its nodes, fan work out over them."""
