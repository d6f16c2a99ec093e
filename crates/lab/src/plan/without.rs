//! A plan that leaves some of its workloads out, as a text that is a plan of its own.

use super::{Plan, PlanError, form_error};

/// The text of a plan without these workloads, and without matrices that have no other one. It is the same text if
/// there is nothing to leave out; else its comments are gone.
///
/// # Errors
/// It is no plan, has no such workload, or nothing is left of it.
pub fn without(text: &str, names: &[String]) -> Result<String, PlanError> {
    if names.is_empty() {
        return Ok(text.to_owned());
    }
    let plan = Plan::parse(text)?;
    if let Some(name) = names
        .iter()
        .find(|name| !plan.workloads.contains_key(*name))
    {
        let known: Vec<&str> = plan.workloads.keys().map(String::as_str).collect();
        return Err(PlanError::Content(format!(
            "there is no workload '{name}' to leave out; known are {}",
            known.join(", ")
        )));
    }
    let mut table: toml::Table = text
        .parse()
        .map_err(|error: toml::de::Error| form_error(text, &error))?;
    let is_left = |name: &toml::Value| names.iter().all(|one| name.as_str() != Some(one));
    if let Some(workloads) = table
        .get_mut("workloads")
        .and_then(|one| one.as_table_mut())
    {
        workloads.retain(|name, _| !names.contains(&name.to_owned()));
    }
    if let Some(matrices) = table.get_mut("matrix").and_then(|one| one.as_array_mut()) {
        matrices.retain_mut(|matrix| {
            let list = matrix
                .get_mut("workloads")
                .and_then(|one| one.as_array_mut());
            list.is_some_and(|list| {
                list.retain(is_left);
                !list.is_empty()
            })
        });
        if matrices.is_empty() {
            let gone = "nothing is left of the plan without what is left out";
            return Err(PlanError::Content(gone.to_owned()));
        }
    }
    let names = names.join(", ");
    Ok(format!("# As it was given, but without: {names}.\n{table}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "question = 'q'\nrepeats = 1\n[workloads.one]\nguest = 'idle'\n\
                        [workloads.two]\nguest = 'kv'\n[[matrix]]\ntechniques = ['auto']\n\
                        workloads = ['one', 'two']\nmemory = ['256M']\n[[matrix]]\n\
                        techniques = ['hybrid']\nworkloads = ['two']\nmemory = ['256M']\n";

    fn check(names: &[&str], expect: &str) {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let said = match without(TEXT, &names) {
            Err(error) => error.to_string(),
            Ok(text) => {
                let cells = Plan::parse(&text).unwrap().cells;
                let cells = cells
                    .iter()
                    .map(|cell| format!("{} {}", cell.way(), cell.workload));
                cells.collect::<Vec<_>>().join(", ")
            }
        };
        assert_eq!(said, expect);
    }

    #[test]
    fn what_is_left_is_a_plan() {
        assert_eq!(without(TEXT, &[]).unwrap(), TEXT);
        check(&[], "auto one, auto two, hybrid two");
        check(&["two"], "auto one");
        check(&["one"], "auto two, hybrid two");
        check(
            &["one", "two"],
            "nothing is left of the plan without what is left out",
        );
        check(
            &["three"],
            "there is no workload 'three' to leave out; known are one, two",
        );
    }
}
