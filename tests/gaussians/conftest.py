from shape_checks import check_shapes

assert check_shapes("dmm_ray.gaussians", z="N D", rows="N D", rotated="N D", validation="M D")
