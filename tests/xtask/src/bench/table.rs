//! The table of a benchmark: medians side by side, geometric means, goals that are missed.

use std::collections::BTreeMap;

use super::child::WALL;
use super::sets::{BLOCK_TIME, GROWTH, IDLE, INSN_TIME, JOBS, PARALLEL, PHASES, WAKEUPS};
use super::{BOOT, BOOT_WALL, OWN, RSS, Row, START, WHOLE, median};

type Results = BTreeMap<String, Vec<Vec<Row>>>;

/// Rows that are not times in which less is better, or not of the guest's work.
const NO_GOAL: [&str; 7] = [BOOT_WALL, RSS, OWN, START, WHOLE, WAKEUPS, INSN_TIME];
/// Rows with a figure that is not to be exceeded, whatever QEMU's is.
const LIMITS: [(&str, f64); 3] = [(IDLE, 0.5), (BLOCK_TIME, 1000.0), (GROWTH, 6.0)];
const KERNEL: [&str; 8] =
    ["syscall", "page-fault", "mmap-munmap", "pipe-ping-pong", "fork-exit", "fork-exec", "signals", "fault-signals"];
const FLOAT: [&str; 8] = ["matrix", "nbody", "solve", "matrix-x87", "nbody-x87", "solve-x87", "filter", "avx2-fma"];
const REP: [&str; 2] = ["rep-movsb", "rep-stosb"];

/// The ratio that a row is to reach with a guest.
fn goal(arch: &str, row: &str) -> Option<f64> {
    let x86 = arch != "riscv64";
    match row {
        _ if NO_GOAL.contains(&row) || row.ends_with(WALL) => None,
        _ if LIMITS.iter().any(|l| l.0 == row) => None,
        _ if PARALLEL.contains(&row) || JOBS.contains(&row) => Some(2.0),
        _ if FLOAT.contains(&row) || REP.contains(&row) => Some(8.0),
        BOOT => Some(1.5),
        "shell" | "fork+exec" if x86 => Some(2.0),
        _ => Some(1.0),
    }
}

/// Whether a row is one of a group.
type Belongs = fn(&str) -> bool;

/// Means that end the table.
const GROUPS: [(&str, Belongs); 5] = [
    ("shell and tools", |row| PHASES.contains(&row)),
    ("programs", is_program),
    ("kernel operations", |row| KERNEL.contains(&row)),
    ("several vCPUs", |row| PARALLEL.contains(&row)),
    ("whole jobs", |row| JOBS.contains(&row)),
];

/// Whether a row is one of the programs'.
fn is_program(row: &str) -> bool {
    let others: [&[&str]; 5] = [&KERNEL, &PHASES, &PARALLEL, &JOBS, &NO_GOAL];
    let limited = LIMITS.iter().any(|l| l.0 == row);
    row != BOOT && !row.ends_with(WALL) && !limited && !others.iter().any(|rows| rows.contains(&row))
}

fn names(results: &Results) -> Vec<&str> {
    let mut names: Vec<&str> = Vec::new();
    for rows in results.values().filter_map(|runs| runs.first()) {
        // A row that only one emulator has goes behind the one before it.
        let mut at = 0;
        for row in rows {
            match names.iter().position(|n| *n == row.0) {
                Some(found) => at = found + 1,
                None => {
                    names.insert(at, &row.0);
                    at += 1;
                }
            }
        }
    }
    names
}

fn value(results: &Results, who: &str, row: &str) -> Option<f64> {
    let runs = results.get(who)?;
    median(runs.iter().filter_map(|r| r.iter().find(|n| n.0 == row)).map(|r| r.1).collect())
}

/// Medians side by side; the ratio is QEMU's time by mimus's, so more is better.
pub fn table(results: &Results, arch: &str, smp: u32) -> String {
    let cell = |v: Option<f64>| v.map_or("-".into(), |v| format!("{v:.3}"));
    let times = |v: Option<f64>| v.filter(|v| v.is_finite()).map_or("-".into(), |v| format!("{v:.2}×"));
    // What the host's compiler makes without vectors, for guests that have none.
    let with_scalar = results.contains_key("scalar");
    let scalar_head = if with_scalar { format!(" {:>9} {:>9}", "scalar", "×scalar") } else { String::new() };
    let mut out = format!(
        "\n{:<24} {:>9} {:>9} {:>8} {:>9} {:>9}{scalar_head}   ({arch}, CPU seconds, medians, -smp {smp})\n",
        "row", "mimus", "QEMU", "ratio", "native", "×native"
    );
    let (mut ratios, mut missed) = (Vec::new(), 0);
    for row in names(results) {
        let [mimus, qemu, native, scalar] = ["mimus", "qemu", "native", "scalar"].map(|who| value(results, who, row));
        let by = |a: Option<f64>, b: Option<f64>| a.zip(b).map(|(a, b)| a / b);
        let (ratio, slower, than_scalar) = (by(qemu, mimus), by(mimus, native), by(mimus, scalar));
        let scalar_cells =
            if with_scalar { format!(" {:>9} {:>9}", cell(scalar), times(than_scalar)) } else { String::new() };
        let miss = goal(arch, row).zip(ratio).filter(|(goal, ratio)| ratio < goal);
        let over = LIMITS.iter().find(|l| l.0 == row && mimus.is_some_and(|figure| figure > l.1));
        missed += usize::from(miss.is_some() || over.is_some());
        let mark = match (miss, over) {
            (Some((goal, _)), _) => format!("  < {goal}"),
            (None, Some((_, limit))) => format!("  > {limit}"),
            (None, None) => String::new(),
        };
        out.push_str(&format!(
            "{row:<24} {:>9} {:>9} {:>8} {:>9} {:>9}{scalar_cells}{mark}\n",
            cell(mimus),
            cell(qemu),
            times(ratio),
            cell(native),
            times(slower)
        ));
        ratios.push((row, ratio, slower, than_scalar));
    }
    for (name, belongs) in GROUPS {
        let own = || ratios.iter().filter(|(row, ..)| belongs(row));
        let means = [mean(own().filter_map(|r| r.1)), mean(own().filter_map(|r| r.2)), mean(own().filter_map(|r| r.3))];
        if means.iter().any(Option::is_some) {
            let label = format!("geomean, {name}");
            let scalar = if with_scalar { format!(" {:>9} {:>9}", "", times(means[2])) } else { String::new() };
            out.push_str(&format!("{label:<44} {:>8} {:>9} {:>9}{scalar}\n", times(means[0]), "", times(means[1])));
        }
    }
    if missed > 0 {
        out.push_str(&format!("{missed} rows miss their goal (marked < or >)\n"));
    }
    out
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let logarithms: Vec<f64> = values.filter(|v| *v > 0.0).map(f64::ln).collect();
    (!logarithms.is_empty()).then(|| (logarithms.iter().sum::<f64>() / logarithms.len() as f64).exp())
}

/// Rows whose program did not compute the same in every run.
pub fn differing(results: &Results) -> Vec<String> {
    let all = || results.values().flatten().flatten().filter(|r| !PHASES.contains(&r.0.as_str()));
    let differs = |name: &str| {
        let mut values = all().filter(|r| r.0 == name).filter_map(|r| r.2.as_ref());
        values.next().is_some_and(|first| values.any(|v| v != first))
    };
    names(results).into_iter().filter(|n| differs(n)).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(seconds: f64, value: &str) -> Vec<Row> {
        let row = |name: &str, s: f64| (name.to_owned(), s, Some(value.to_owned()));
        vec![(BOOT.to_owned(), seconds, None), row("gzip", seconds), row("sort", seconds), row("matrix", seconds)]
    }

    #[test]
    fn medians_goals_and_means() {
        let results = BTreeMap::from([
            ("qemu".to_owned(), vec![run(2.0, "a"), run(4.0, "a"), run(3.0, "a")]),
            ("mimus".to_owned(), vec![run(1.0, "a"), run(1.5, "a"), run(2.0, "a")]),
            ("native".to_owned(), vec![run(0.5, "a")]),
        ]);
        let text = table(&results, "x86_64", 1);
        assert!(text.contains("2.00×") && text.contains("3.00×") && text.contains("geomean, programs"), "{text}");
        let matrix = text.lines().find(|l| l.starts_with("matrix")).unwrap();
        assert!(matrix.ends_with("< 8"), "{text}");
        assert!(text.contains("1 rows miss"), "{text}");
        assert!(differing(&results).is_empty());
    }

    #[test]
    fn a_guest_without_vectors_is_compared_twice() {
        let results = BTreeMap::from([
            ("mimus".to_owned(), vec![run(3.0, "a")]),
            ("native".to_owned(), vec![run(1.0, "a")]),
            ("scalar".to_owned(), vec![run(2.0, "a")]),
        ]);
        let text = table(&results, "riscv64", 1);
        let sort = text.lines().find(|l| l.starts_with("sort")).unwrap();
        assert!(text.contains("×scalar") && sort.contains("3.00×") && sort.contains("1.50×"), "{text}");
    }

    #[test]
    fn limits_are_of_the_figure() {
        let run = |figure: f64| vec![vec![(IDLE.to_owned(), figure, None), ("job-tar, wall".to_owned(), figure, None)]];
        let results = BTreeMap::from([("qemu".to_owned(), run(9.0)), ("mimus".to_owned(), run(0.6))]);
        let text = table(&results, "x86_64", 1);
        assert!(text.contains("> 0.5") && text.contains("1 rows miss") && !text.contains("geomean"), "{text}");
    }

    #[test]
    fn wrong_results_are_named() {
        let results =
            BTreeMap::from([("qemu".to_owned(), vec![run(2.0, "a")]), ("mimus".to_owned(), vec![run(1.0, "b")])]);
        assert_eq!(differing(&results), ["sort", "matrix"]);
    }

    #[test]
    fn a_row_of_one_emulator_keeps_its_place() {
        let mut more = run(1.0, "a");
        more.insert(2, ("only".to_owned(), 1.0, None));
        let results = BTreeMap::from([("mimus".to_owned(), vec![more]), ("qemu".to_owned(), vec![run(1.0, "a")])]);
        assert_eq!(names(&results), [BOOT, "gzip", "only", "sort", "matrix"]);
    }
}
