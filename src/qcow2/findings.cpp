#include "qcow2/findings.h"

#include <algorithm>
#include <tuple>

namespace qcow::qcow2 {

void Findings::add(CheckFinding::Severity severity, std::uint64_t order, std::string place, std::string what,
                   std::uint64_t count) {
    const std::lock_guard lock(mutex_);
    switch (severity) {
        case CheckFinding::Severity::leak: leaks_ += count; break;
        case CheckFinding::Severity::corruption: corruptions_ += count; break;
        case CheckFinding::Severity::error: errors_ += count; break;
    }
    if (kept_.size() < max_kept_) kept_.push_back({order, {severity, std::move(place), std::move(what)}});
}

void Findings::move_to(CheckReport& report) {
    // By text where the place is the same, so that it does not matter which thread was first.
    std::ranges::sort(kept_, {},
                      [](const Kept& kept) { return std::tie(kept.order, kept.finding.place, kept.finding.what); });
    for (auto& kept : kept_) report.findings.push_back(std::move(kept.finding));
    report.leaks += leaks_;
    report.corruptions += corruptions_;
    report.errors += errors_;
}

}  // namespace qcow::qcow2
