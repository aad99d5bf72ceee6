from shape_checks import check_shapes

assert check_shapes("dmm_ray.baselines", z="N D")
