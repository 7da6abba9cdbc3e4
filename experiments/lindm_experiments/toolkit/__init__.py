"""The theory and the measurements for data of your own: exact risks, the ladder of bounds, your own laws and layers.

Here as in the experiments the two packages meet: `lindm` measures, `lindm_theory` predicts. `import lindm as ld` reaches this
package as `ld.theory`, `ld.measure_risk` and `ld.measure_ladder`.
"""
