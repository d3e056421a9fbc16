#include "qcow2/findings.h"

#include <algorithm>
#include <tuple>

namespace qcow::qcow2 {

bool Findings::count_one(CheckFinding::Severity severity, std::uint64_t count) {
    const std::lock_guard lock(mutex_);
    switch (severity) {
        case CheckFinding::Severity::leak: leaks_ += count; break;
        case CheckFinding::Severity::corruption: corruptions_ += count; break;
        case CheckFinding::Severity::error: errors_ += count; break;
    }
    return kept_.size() < max_kept_;
}

void Findings::keep(Kept finding) {
    const std::lock_guard lock(mutex_);
    if (kept_.size() < max_kept_) kept_.push_back(std::move(finding));
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
