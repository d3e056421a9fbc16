#include "qcow2/findings.h"

#include <algorithm>
#include <iterator>
#include <tuple>

namespace qcow::qcow2 {

bool Findings::count_one(CheckFinding::Severity severity, std::uint64_t count) {
    const std::lock_guard lock(mutex_);
    switch (severity) {
        case CheckFinding::Severity::leak: leaks_ += count; break;
        case CheckFinding::Severity::corruption: corruptions_ += count; break;
        case CheckFinding::Severity::error: errors_ += count; break;
        case CheckFinding::Severity::postponed: postponed_ += count; break;
    }
    return list_of(severity).size() < max_kept_;
}

void Findings::keep(Kept finding) {
    const std::lock_guard lock(mutex_);
    auto& list = list_of(finding.finding.severity);
    if (list.size() < max_kept_) list.push_back(std::move(finding));
}

void Findings::move_to(CheckReport& report) {
    const auto room = static_cast<std::ptrdiff_t>(std::min(max_kept_ - kept_.size(), kept_postponed_.size()));
    std::move(kept_postponed_.begin(), kept_postponed_.begin() + room, std::back_inserter(kept_));
    // By text where the place is the same, so that it does not matter which thread was first.
    std::ranges::sort(kept_, {},
                      [](const Kept& kept) { return std::tie(kept.order, kept.finding.place, kept.finding.what); });
    for (auto& kept : kept_) report.findings.push_back(std::move(kept.finding));
    report.leaks += leaks_;
    report.corruptions += corruptions_;
    report.errors += errors_;
    report.postponed += postponed_;
}

}  // namespace qcow::qcow2
