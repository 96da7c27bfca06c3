//! Products of the rows of each expert, over the packed matrix product.
//!
//! Rows are divided into tasks in a way that depends on the plan alone, and a task's bits do not depend on how many threads
//! multiply it, so that neither do those of the result.

use rayon::prelude::*;

use crate::device::cpu::gemm::{self, Arithmetic, MatrixMut, MatrixRef};
use crate::device::cpu::simd::{Element, multiversion, with_element};
use crate::device::experts::{ExpertFinish, RoutingPlan};
use crate::device::{Operand, cpu};
use crate::error::Result;
use crate::{DType, Tensor};

/// Rows of a task: enough that packing an expert's weights again for the next ones costs little.
const ROWS_A_TASK: usize = 256;

/// Columns of a task that sums.
const COLUMNS_A_TASK: usize = 512;

/// Rows of one expert.
struct Task {
    expert: usize,
    first: usize,
    rows: usize,
}

/// The rows of all experts in order, no more than so many at a time.
fn tasks(plan: &RoutingPlan, most: usize) -> Vec<Task> {
    let offsets = plan.offsets.as_slice::<u32>();
    let mut tasks = Vec::new();
    for (expert, range) in offsets.windows(2).enumerate() {
        let (start, end) = (range[0] as usize, range[1] as usize);
        for first in (start..end).step_by(most) {
            tasks.push(Task { expert, first, rows: most.min(end - first) });
        }
    }
    tasks
}

/// Rows of a matrix.
fn rows_of(tensor: &Tensor, first: usize, rows: usize) -> Result<MatrixRef<'_>> {
    let columns = tensor.columns();
    Ok(cpu::view(&Operand::plain(tensor))?.part(first..first + rows, 0..columns))
}

/// One matrix of a stack.
fn expert_of<'a>(stack: &Operand<'a>, expert: usize) -> Result<MatrixRef<'a>> {
    let (rows, columns) = (stack.tensor.shape()[1], stack.tensor.columns());
    let all = cpu::view(&Operand::plain(stack.tensor))?;
    let one = all.part(expert * rows..(expert + 1) * rows, 0..columns);
    Ok(if stack.transposed { one.transposed() } else { one })
}

/// Multiplies all tasks, each on one thread where there are enough of them.
fn run<X: Send>(
    tasks: Vec<(Task, &mut [X])>,
    multiply: impl Fn(
        &Task,
        &mut [X],
        &mut dyn FnMut(&[gemm::Product<'_>], MatrixMut<'_>, &gemm::Epilogue<'_>),
    ) -> Result<()>
    + Sync,
    arithmetic: Arithmetic,
) -> Result<()> {
    if tasks.len() < 2 * rayon::current_num_threads() {
        return tasks.into_iter().try_for_each(|(task, out)| {
            multiply(&task, out, &mut |products, out, epilogue| {
                gemm::gemm(products, out, epilogue, arithmetic)
            })
        });
    }
    tasks.into_par_iter().with_max_len(1).try_for_each(|(task, out)| {
        multiply(&task, out, &mut |products, out, epilogue| {
            gemm::gemm_on_this_thread(products, out, epilogue, arithmetic);
        })
    })
}

/// Hands each task its rows of the output.
fn divided<X>(tasks: Vec<Task>, mut out: &mut [X], columns: usize) -> Vec<(Task, &mut [X])> {
    let mut parts = Vec::with_capacity(tasks.len());
    for task in tasks {
        let (own, rest) = std::mem::take(&mut out).split_at_mut(task.rows * columns);
        parts.push((task, own));
        out = rest;
    }
    parts
}

pub(super) fn multiply(
    products: &[(&Tensor, Operand<'_>)],
    plan: &RoutingPlan,
    finish: &ExpertFinish<'_>,
    out: &mut Tensor,
    arithmetic: Arithmetic,
) -> Result<()> {
    match out.dtype() {
        DType::F32 => multiply_into::<f32>(products, plan, finish, out, arithmetic),
        DType::Bf16 => multiply_into::<half::bf16>(products, plan, finish, out, arithmetic),
        other => Err(cpu::unsupported("multiply_experts", format!("the result is {other}"))),
    }
}

fn multiply_into<X: Element>(
    products: &[(&Tensor, Operand<'_>)],
    plan: &RoutingPlan,
    finish: &ExpertFinish<'_>,
    out: &mut Tensor,
    arithmetic: Arithmetic,
) -> Result<()>
where
    for<'a> gemm::ElementsMut<'a>: From<&'a mut [X]>,
{
    let columns = out.columns();
    let bias = finish.bias.map(Tensor::as_slice::<f32>);
    let parts = divided(tasks(plan, ROWS_A_TASK), out.as_mut_slice::<X>(), columns);
    let multiply =
        |task: &Task,
         out: &mut [X],
         gemm: &mut dyn FnMut(&[gemm::Product<'_>], MatrixMut<'_>, &gemm::Epilogue<'_>)| {
            let views = products
                .iter()
                .map(|(left, right)| {
                    let left = rows_of(left, task.first, task.rows)?;
                    Ok(gemm::Product { left, right: expert_of(right, task.expert)? })
                })
                .collect::<Result<Vec<_>>>()?;
            let epilogue = gemm::Epilogue {
                scale: finish.scale,
                bias: bias.map(|bias| &bias[task.expert * columns..][..columns]),
                accumulate: finish.accumulate,
            };
            gemm(&views, MatrixMut::row_major(out, task.rows, columns), &epilogue);
            Ok(())
        };
    run(parts, multiply, arithmetic)
}

pub(super) fn add_gradients(
    left: &Tensor,
    right: &Tensor,
    plan: &RoutingPlan,
    scale: f32,
    out: &mut Tensor,
) -> Result<()> {
    let (rows, columns) = (out.shape()[1], out.columns());
    let mut of_expert: Vec<Option<&mut [f32]>> =
        out.as_mut_slice::<f32>().chunks_exact_mut((rows * columns).max(1)).map(Some).collect();
    let parts: Vec<(Task, &mut [f32])> = tasks(plan, usize::MAX)
        .into_iter()
        .filter_map(|task| of_expert.get_mut(task.expert).and_then(Option::take).map(|own| (task, own)))
        .collect();
    let epilogue = gemm::Epilogue { scale, bias: None, accumulate: true };
    let multiply =
        |task: &Task,
         out: &mut [f32],
         gemm: &mut dyn FnMut(&[gemm::Product<'_>], MatrixMut<'_>, &gemm::Epilogue<'_>)| {
            let left = rows_of(left, task.first, task.rows)?.transposed();
            let right = rows_of(right, task.first, task.rows)?;
            gemm(&[gemm::Product { left, right }], MatrixMut::row_major(out, rows, columns), &epilogue);
            Ok(())
        };
    run(parts, multiply, Arithmetic::of(left.dtype()))
}

multiversion! {
    fn add_rows<X: Element>(x: &[X], width: usize, first: usize, sums: &mut [f32]) {
        for row in x.chunks_exact(width) {
            for (sum, &value) in sums.iter_mut().zip(&row[first..]) {
                *sum += value.widen();
            }
        }
    }
}

pub(super) fn add_sums(x: &Tensor, plan: &RoutingPlan, out: &mut Tensor) {
    let width = x.columns();
    let offsets = plan.offsets.as_slice::<u32>();
    with_element!(x.dtype(), X => {
        let x = x.as_slice::<X>();
        out.as_mut_slice::<f32>().par_chunks_exact_mut(width).zip(offsets.par_windows(2)).for_each(|(sums, range)| {
            let rows = &x[range[0] as usize * width..range[1] as usize * width];
            for (task, sums) in sums.chunks_mut(COLUMNS_A_TASK).enumerate() {
                add_rows(rows, width, task * COLUMNS_A_TASK, sums);
            }
        });
    });
}
