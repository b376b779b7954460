"""Plans for machines that are not there: does a step fit, what does it move, how long might it take."""
