"""What a run will do, and what to expect of it, before its first update.

In: utterances, flags and the devices at hand. Out: plan.json, its lines for people, warnings and forecasts. Begin with
`plan`.
"""
