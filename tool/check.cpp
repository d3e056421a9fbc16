// qcow check: verifies the metadata of an image.

#include <fmt/format.h>

#include "command.h"
#include "progress.h"
#include "qcow/text.h"
#include "text.h"

namespace tool {
namespace {

constexpr int corrupt = 2;
constexpr int harmless = 3;

struct Options {
    Source source;
    bool json = false;
    bool progress = false;
    unsigned workers = 0;
    std::string memory = "1G";
};

std::string_view severity_name(qcow::CheckFinding::Severity severity) {
    switch (severity) {
        case qcow::CheckFinding::Severity::leak: return "leak";
        case qcow::CheckFinding::Severity::corruption: return "corruption";
        case qcow::CheckFinding::Severity::error: return "error";
        case qcow::CheckFinding::Severity::postponed: return "postponed";
    }
    return "";
}

std::string_view kind_name(qcow::CheckFinding::Kind kind) {
    using Kind = qcow::CheckFinding::Kind;
    switch (kind) {
        case Kind::other: return "other";
        case Kind::leak: return "leak";
        case Kind::refcount_too_low: return "refcount-too-low";
        case Kind::refcount_old: return "refcount-old";
        case Kind::uncounted: return "uncounted";
        case Kind::overlap: return "overlap";
        case Kind::past_end: return "past-end";
        case Kind::misaligned: return "misaligned";
        case Kind::reserved_bits: return "reserved-bits";
        case Kind::copied_flag: return "copied-flag";
        case Kind::bad_entry: return "bad-entry";
        case Kind::bad_header: return "bad-header";
        case Kind::bad_table: return "bad-table";
        case Kind::wrong_length: return "wrong-length";
        case Kind::duplicate_name: return "duplicate-name";
        case Kind::misplaced: return "misplaced";
        case Kind::backing_chain: return "backing-chain";
    }
    return "";
}

std::string_view remedy_name(qcow::CheckFinding::Remedy remedy) {
    using Remedy = qcow::CheckFinding::Remedy;
    switch (remedy) {
        case Remedy::nothing: return "nothing";
        case Remedy::rebuild_refcounts: return "rebuild-refcounts";
        case Remedy::correct_entry: return "correct-entry";
        case Remedy::drop_entry: return "drop-entry";
        case Remedy::copy_contents: return "copy-contents";
        case Remedy::remove_bitmap: return "remove-bitmap";
        case Remedy::remove_snapshot: return "remove-snapshot";
    }
    return "";
}

Json finding_json(const qcow::CheckFinding& finding) {
    Json json = {{"severity", severity_name(finding.severity)},
                 {"kind", kind_name(finding.kind)},
                 {"place", finding.place},
                 {"what", finding.what},
                 {"remedy", remedy_name(finding.remedy)}};
    if (finding.cluster) json["cluster"] = finding.cluster->value;
    return json;
}

void print_report_json(const qcow::CheckReport& report, const std::string& path, qcow::Format format) {
    Json json = {{"filename", path},
                 {"format", qcow::format_name(format)},
                 {"check-errors", report.errors},
                 {"corruptions", report.corruptions},
                 {"leaks", report.leaks},
                 {"dirty", report.dirty},
                 {"marked-corrupt", report.marked_corrupt},
                 {"postponed", report.postponed},
                 {"image-end-offset", report.image_end},
                 {"total-clusters", report.total_clusters},
                 {"allocated-clusters", report.allocated_clusters},
                 {"compressed-clusters", report.compressed_clusters},
                 {"fragmented-clusters", report.fragmented_clusters},
                 {"findings", Json::array()}};
    for (const auto& finding : report.findings) json["findings"].push_back(finding_json(finding));
    print_json(json);
}

double percent(std::uint64_t part, std::uint64_t whole) {
    return whole == 0 ? 0 : 100.0 * static_cast<double>(part) / static_cast<double>(whole);
}

/// Prints what the user can do about the findings.
void print_advice(const qcow::CheckReport& report, const std::string& path) {
    if (report.dirty) {
        fmt::print("The image was not closed: its last writer left old refcounts in the file. This is not damage.\n");
        if (report.mended_by_writing()) {
            fmt::print("Opening it for writing rebuilds the refcounts: qcow resize {} +0\n", qcow::printable(path));
        } else {
            fmt::print(
                "It cannot be opened for writing, which would rebuild the refcounts, because of the other findings.\n");
        }
    }
    if (report.marked_corrupt && report.corruptions + report.errors == 0) {
        fmt::print(
            "The image is marked as corrupt, so it cannot be written, but no damage was found. A copy is not marked: "
            "qcow convert -O qcow2 {0} {0}.new\n",
            qcow::printable(path));
    }
    if (report.corruptions > 0) {
        fmt::print(
            "Do not write to the image. Restore it from a backup, or copy what is readable: qcow convert --salvage\n");
    } else if (report.leaks > 0) {
        fmt::print("Leaked clusters waste space, but do no harm.\n");
    }
}

void print_report(const qcow::CheckReport& report, const std::string& path) {
    using Severity = qcow::CheckFinding::Severity;
    auto more = report.leaks + report.corruptions + report.errors;
    for (const auto& f : report.findings) {
        if (f.severity == Severity::postponed) continue;  // only their number is printed
        fmt::print("{}: {}: {}\n",
                   paint(severity_name(f.severity), f.severity == Severity::leak ? Colour::yellow : Colour::red),
                   qcow::printable(f.place), qcow::printable(f.what));
        if (more > 0) --more;
    }
    if (more > 0) fmt::print("... and {} more\n", more);
    fmt::print("{} of {} clusters allocated ({:.1f}%), {:.1f}% of those compressed, {:.1f}% fragmented\n",
               report.allocated_clusters, report.total_clusters,
               percent(report.allocated_clusters, report.total_clusters),
               percent(report.compressed_clusters, report.allocated_clusters),
               percent(report.fragmented_clusters, report.allocated_clusters));
    fmt::print("the last cluster in use ends at host offset {:#x} ({})\n", report.image_end, human(report.image_end));
    if (report.clean()) {
        fmt::print("{}: {}\n", qcow::printable(path), paint("clean", Colour::green));
    } else {
        auto sums = fmt::format("{} corruptions, {} leaked clusters, {} errors (not verified)", report.corruptions,
                                report.leaks, report.errors);
        if (report.dirty) sums += fmt::format(", {} postponed refcounts", report.postponed);
        fmt::print("{}: {}\n", qcow::printable(path),
                   paint(sums, report.corruptions + report.errors > 0 ? Colour::red : Colour::yellow));
    }
    print_advice(report, path);
}

qcow::Result<int> run(const Options& options) {
    QCOW_TRY_VOID(verify_is_not_stdin(options.source.path));
    Progress progress("checking", options.progress);
    qcow::CheckOptions check;
    check.workers = options.workers;
    check.memory_bytes = parse_size(options.memory);
    check.control.progress = [&](std::uint64_t done, std::uint64_t total) { progress.update(done, total); };
    check.control.warn = warn_on_stderr();
    const auto [format, report] = QCOW_TRY(qcow::check(QCOW_TRY(spec_of(options.source)), check));
    if (options.json) {
        print_report_json(report, options.source.path, format);
    } else {
        print_report(report, options.source.path);
    }
    if (report.corruptions > 0) return corrupt;
    if (report.errors > 0) return failed;
    return report.leaks + report.postponed > 0 ? harmless : ok;
}

}  // namespace

void declare_check(CLI::App& root, int& status) {
    const auto options = std::make_shared<Options>();
    auto& app = declare(
        root, status, "check", "Check the metadata of an image, without changing it",
        "Counts the references to each cluster and compares them with the refcounts. Verifies all tables, snapshots\n"
        "and bitmaps, and that the backing chain can be opened.\n"
        "An image that was not closed may have old refcounts (\"postponed\"). They are not damage: opening the image\n"
        "for writing corrects them.\n"
        "Exit status: 0 clean; 1 the check failed or could not verify everything; 2 corrupt; 3 only leaked clusters\n"
        "or postponed refcounts.\n"
        "Example:\n"
        "  qcow check --json disk.qcow2 | jq .corruptions",
        [options] { return run(*options); });
    add_source_options(app, options->source);
    app.add_flag("--json", options->json, "Print JSON");
    app.add_flag("-p,--progress", options->progress, "Show progress even if standard error is not a terminal");
    add_workers_option(app, options->workers);
    app.add_option("--memory", options->memory, "Memory limit of the check")
        ->type_name("SIZE")
        ->check(size_text)
        ->capture_default_str();
}

}  // namespace tool
