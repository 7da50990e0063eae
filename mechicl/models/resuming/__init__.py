"""Many variations of one recorded run, each resumed where it differs."""
