//! Runs one operator a number of times, for counters of instructions: two runs that differ in the number of times give
//! the operator's own count, whatever else the process does (`.ci/instructions`).
//!
//! `repeat` prints the cases; `repeat CASE TIMES` runs one, on matrices of 64 x 2048.

#[path = "../benches/cases/mod.rs"]
mod cases;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [name, times] = args.as_slice() else {
        println!("{}", cases::NAMES.join("\n"));
        return;
    };
    let times: usize = times.parse().expect("a number of times");
    let mut case = cases::case(name, 64, 2048).expect("a case of this name");
    println!("{} {} {} bytes", cases::backend().name(), case.items, case.bytes.len());
    for _ in 0..times {
        (case.run)();
    }
}
