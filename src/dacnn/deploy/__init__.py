"""From a trained network to what runs it elsewhere: one Program, and the back ends that read nothing else."""
