"""Whether the nodes of a job are fit to train, before they do: each looked at by itself, and all together.

    places      what the run reads and writes
    node        what a process sees where it stands, its GPUs included (`gpu_state`)
    folders     whether what one node writes is there for the others
    exchange    collectives, and which node is slow (`rounds` says who meets whom)
    meeting     how the processes hear of each other, with an end to every wait
    judgement   what follows from the reports, and `report` how it is said
    nodes       all of this in turn

Rank 0 judges; nobody waits for ever for a process that stands still, which is named in place of that.
"""
