//! what each guest architecture is (registers, state groups, numbers, names).
