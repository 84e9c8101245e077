//! Plots of a bench's file: medians as bars with a whisker to the 99th percentile, on a scale of ratios.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, anyhow};
use plotters::prelude::*;
use serde_json::Value;

const WIDTH: u32 = 900;
const BAR_HEIGHT: u32 = 22;
/// Title, axis and margins.
const FRAME_HEIGHT: u32 = 90;
/// Left of the bars.
const LABELS: u32 = 330;

/// Units of figures that are compared; counts and ratios of one row to another say nothing side by side.
const PLOTTED: [&str; 5] = ["ms", "of raw", "rounds/s", "GB/s", "MiB"];

struct Bar {
    label: String,
    subject: String,
    median: f64,
    p99: f64,
}

/// Writes `<bench>-<unit>.svg` for each unit that has more than one figure.
pub(crate) fn run(file: &Path, into: &Path) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
    let report: Value = serde_json::from_str(&text)?;
    let bench = report["bench"].as_str().context("no name of a bench")?;
    let rows = report["rows"].as_array().context("no rows")?;
    std::fs::create_dir_all(into)?;
    let units: BTreeSet<&str> = rows.iter().filter_map(|row| row["unit"].as_str()).collect();
    let units = units.into_iter().filter(|unit| PLOTTED.contains(unit));
    for unit in units {
        let bars: Vec<Bar> = rows.iter().filter(|row| row["unit"] == unit).filter_map(bar).collect();
        if bars.len() < 2 {
            continue;
        }
        let name: String = unit.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
        let path = into.join(format!("{bench}-{name}.svg"));
        chart(&path, &format!("{bench}: {unit}, median, whisker to the 99th percentile"), &bars)
            .map_err(|error| anyhow!("{}: {error}", path.display()))?;
        println!("{}", path.display());
    }
    Ok(())
}

/// What has no place on a scale of ratios is left out.
fn bar(row: &Value) -> Option<Bar> {
    let (median, p99) = (row["median"].as_f64()?, row["p99"].as_f64()?);
    let (name, subject) = (row["name"].as_str()?, row["subject"].as_str()?);
    let bar = Bar { label: format!("{name}: {subject}"), subject: subject.to_owned(), median, p99 };
    (median > 0.0 && p99.is_finite()).then_some(bar)
}

fn chart(path: &Path, title: &str, bars: &[Bar]) -> Result<(), Box<dyn std::error::Error>> {
    let count = u32::try_from(bars.len())?;
    let root = SVGBackend::new(path, (WIDTH, count * BAR_HEIGHT + FRAME_HEIGHT)).into_drawing_area();
    root.fill(&WHITE)?;
    let least = bars.iter().map(|bar| bar.median).fold(f64::INFINITY, f64::min) / 2.0;
    let most = bars.iter().map(|bar| bar.p99.max(bar.median)).fold(0.0, f64::max) * 1.3;
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 16))
        .margin(8)
        .margin_right(30)
        .margin_left(LABELS)
        .x_label_area_size(30)
        .build_cartesian_2d((least..most).log_scale(), 0.0..f64::from(count))?;
    chart.configure_mesh().disable_y_mesh().disable_y_axis().x_label_formatter(&|x| number(*x)).draw()?;
    for (at, bar) in bars.iter().enumerate() {
        let bottom = f64::from(count) - at as f64 - 0.85;
        let (middle, top) = (bottom + 0.35, bottom + 0.7);
        let color = if bar.subject.starts_with("understudy") {
            RGBColor(46, 110, 160)
        } else if bar.subject.starts_with("floor") {
            RGBColor(150, 190, 150)
        } else {
            RGBColor(190, 190, 190)
        };
        chart.draw_series([Rectangle::new([(least, bottom), (bar.median, top)], color.filled())])?;
        if bar.p99 > bar.median {
            chart.draw_series([PathElement::new([(bar.median, middle), (bar.p99, middle)], BLACK)])?;
        }
        let (x, y) = chart.backend_coord(&(least, top));
        let text = format!("{}  {}", bar.label, number(bar.median));
        let style = ("sans-serif", 12).into_font().color(&BLACK);
        let anchor = plotters::style::text_anchor::Pos::new(
            plotters::style::text_anchor::HPos::Right,
            plotters::style::text_anchor::VPos::Top,
        );
        root.draw(&Text::new(text, (x - 6, y), style.pos(anchor)))?;
    }
    root.present()?;
    Ok(())
}

/// With three digits that say something.
fn number(value: f64) -> String {
    let digits = (2.0 - value.abs().max(1e-9).log10().floor()).clamp(0.0, 6.0);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "from 0 to 6")]
    let digits = digits as usize;
    format!("{value:.digits$}")
}
