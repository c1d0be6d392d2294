def stage_table(contender, work):
    return {}
