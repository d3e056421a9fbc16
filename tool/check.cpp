// qcow check: verifies the metadata of an image.

#include <fmt/format.h>

#include <algorithm>

#include "command.h"
#include "progress.h"
#include "qcow/check.h"
#include "qcow/repair.h"
#include "qcow/text.h"
#include "text.h"

namespace tool {
namespace {

constexpr int corrupt = 2;
constexpr int harmless = 3;
constexpr int no_check = 63;  // as in qemu-img

struct CheckOptions {
    Source source;
    bool json = false;
    bool progress = false;
    unsigned workers = 0;
    std::string memory = "1G";
    std::string repair;  // "leaks", "all", or empty: only check
    bool dry_run = false;
    bool remove_inconsistent_bitmaps = false;
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

std::string_view finding_name(qcow::CheckFinding::Kind kind) {
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
        case Kind::bad_encryption: return "bad-encryption";
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
                 {"kind", finding_name(finding.kind)},
                 {"place", finding.place},
                 {"what", finding.what},
                 {"remedy", remedy_name(finding.remedy)}};
    if (finding.cluster) json["cluster"] = finding.cluster->value;
    return json;
}

/// The counts and marks of a report.
Json counts_json(const qcow::CheckReport& report) {
    return {{"check-errors", report.errors},
            {"corruptions", report.corruptions},
            {"leaks", report.leaks},
            {"dirty", report.dirty},
            {"marked-corrupt", report.marked_corrupt},
            {"postponed", report.postponed},
            {"counted-past-end", report.counted_past_end},
            {"missing-bytes", report.missing_bytes}};
}

Json report_json(const qcow::CheckReport& report, const std::string& path, qcow::Format format) {
    Json json = {{"filename", path}, {"format", qcow::format_name(format)}};
    json.update(counts_json(report));
    json.update(Json{{"inconsistent-bitmaps", report.inconsistent_bitmaps},
                     {"image-end-offset", report.image_end},
                     {"compact-bytes", report.compact_bytes},
                     {"total-clusters", report.total_clusters},
                     {"allocated-clusters", report.allocated_clusters},
                     {"compressed-clusters", report.compressed_clusters},
                     {"fragmented-clusters", report.fragmented_clusters},
                     {"findings", Json::array()}});
    for (const auto& finding : report.findings) json["findings"].push_back(finding_json(finding));
    return json;
}

std::string_view loss_name(qcow::RepairLoss::What what) {
    switch (what) {
        case qcow::RepairLoss::What::guest_data: return "guest-data";
        case qcow::RepairLoss::What::snapshot: return "snapshot";
        case qcow::RepairLoss::What::bitmap: return "bitmap";
    }
    return "";
}

Json loss_json(const qcow::RepairLoss& loss) {
    Json json = {{"what", loss_name(loss.what)}, {"why", loss.why}};
    if (loss.what == qcow::RepairLoss::What::guest_data) {
        json["start"] = loss.guest.value;
        json["length"] = loss.length;
        json["in-snapshots"] = loss.in_snapshots;
        json["reads-as-zeros"] = loss.reads_as_zeros;
    } else {
        json["name"] = loss.name;
    }
    return json;
}

double percent(std::uint64_t part, std::uint64_t whole) {
    return whole == 0 ? 0 : 100.0 * static_cast<double>(part) / static_cast<double>(whole);
}

std::string names_text(const std::vector<std::string>& names) {
    std::string text;
    for (const auto& name : names) text += fmt::format("{}\"{}\"", text.empty() ? "" : ", ", qcow::printable(name));
    return text;
}

/// Prints what the user can do about the findings.
void print_advice(const qcow::CheckReport& report, const std::string& path) {
    if (report.dirty) {
        fmt::print(
            "The image was not closed: its last writer left old refcounts or flags in the file. This is not damage.\n");
        if (report.mended_by_writing()) {
            fmt::print("Opening it for writing corrects them, and so does qcow check -r all {}\n",
                       qcow::printable(path));
        } else {
            fmt::print("It cannot be opened for writing, which would rebuild them, because of the other findings.\n");
        }
    }
    if (report.marked_corrupt && report.corruptions + report.errors == 0) {
        fmt::print(
            "The image is marked as corrupt, so it cannot be written, but no damage was found. This clears the mark: "
            "qcow check -r all {}\n",
            qcow::printable(path));
    }
    if (report.missing_bytes > 0) {
        fmt::print(
            "The file ends {} bytes before its last table does: it was cut. This adds zeros in their place: "
            "qcow check -r all {}\n",
            report.missing_bytes, qcow::printable(path));
    }
    if (!report.inconsistent_bitmaps.empty()) {
        fmt::print(
            "Bitmaps marked as inconsistent (in use, or not closed): {}. This removes them: qcow check -r all "
            "--remove-inconsistent-bitmaps {}\n",
            names_text(report.inconsistent_bitmaps), qcow::printable(path));
    }
    const bool locked = std::ranges::any_of(report.findings, [](const qcow::CheckFinding& finding) {
        return finding.kind == qcow::CheckFinding::Kind::bad_encryption &&
               finding.severity == qcow::CheckFinding::Severity::corruption;
    });
    if (locked) {
        fmt::print(
            "No repair mends an encryption header, without which no key opens the image. Restore it from a backup.\n");
    } else if (report.corruptions > 0) {
        fmt::print(
            "Do not write to the image. Restore it from a backup, copy what is readable (qcow convert --salvage), or "
            "see what a repair would lose: qcow check -r all --dry-run {}\n",
            qcow::printable(path));
    } else if (report.leaks > 0) {
        fmt::print("Leaked clusters waste space, but do no harm. This gives them back: qcow check -r leaks {}\n",
                   qcow::printable(path));
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
    if (report.compact_bytes > 0)
        fmt::print("qcow compact would make the file at least {} shorter\n", human(report.compact_bytes));
    if (report.clean()) {
        fmt::print("{}: {}\n", qcow::printable(path), paint("clean", Colour::green));
    } else {
        auto sums = fmt::format("{} corruptions, {} leaked clusters, {} errors (not verified)", report.corruptions,
                                report.leaks, report.errors);
        if (report.dirty) sums += fmt::format(", {} postponed refcounts and flags", report.postponed);
        fmt::print("{}: {}\n", qcow::printable(path),
                   paint(sums, report.corruptions + report.errors > 0 ? Colour::red : Colour::yellow));
    }
    if (report.counted_past_end > 0)
        fmt::print("{} clusters past the end of the file have a refcount, but no reference\n", report.counted_past_end);
    print_advice(report, path);
}

int check_status(const qcow::CheckReport& report) {
    if (report.corruptions > 0) return corrupt;
    if (report.errors > 0) return failed;
    return report.leaks + report.postponed > 0 ? harmless : ok;
}

qcow::Result<int> run_check(const CheckOptions& options, const qcow::JobControl& control) {
    qcow::CheckOptions check;
    check.workers = options.workers;
    check.memory_bytes = parse_size(options.memory);
    check.control = control;
    const auto [format, report] = QCOW_TRY(qcow::check(QCOW_TRY(spec_of(options.source)), check));
    if (options.json) {
        print_json(report_json(report, options.source.path, format));
    } else {
        print_report(report, options.source.path);
    }
    return check_status(report);
}

void print_repair(const qcow::RepairResult& result, bool dry_run) {
    if (!result.changed) {
        fmt::print("{}\n", result.after.clean() ? "nothing to repair" : "nothing can be repaired");
        return;
    }
    const auto* were = dry_run ? "would be" : "were";
    const auto* was = dry_run ? "would be" : "was";
    fmt::print("{} leaked clusters and {} corruptions {} repaired\n", result.leaks_fixed, result.corruptions_fixed,
               were);
    if (result.postponed_fixed > 0)
        fmt::print("{} postponed refcounts and flags {} corrected\n", result.postponed_fixed, were);
    if (result.cleared_dirty()) fmt::print("the mark \"dirty\" {} cleared\n", was);
    if (result.cleared_corrupt()) fmt::print("the mark \"corrupt\" {} cleared\n", was);
    if (result.after.marked_corrupt && !result.before.marked_corrupt)
        fmt::print("the image {} marked as corrupt, so that nobody writes to it\n", was);
    if (result.refcounts_rebuilt) fmt::print("the refcounts {} rebuilt\n", were);
    if (result.copied_clusters > 0)
        fmt::print("{} clusters {} copied to places of their own\n", result.copied_clusters, were);
    if (!result.removed_bitmaps.empty())
        fmt::print("inconsistent bitmaps {} removed: {}\n", were, names_text(result.removed_bitmaps));
    fmt::print("the check after {} repair:\n", dry_run ? "such a" : "the");
}

qcow::Result<int> run_repair(const CheckOptions& options, const qcow::JobControl& control) {
    const bool all = options.repair == "all";
    qcow::RepairOptions repair;
    repair.what = all ? qcow::RepairOptions::What::all : qcow::RepairOptions::What::leaks;
    repair.dry_run = options.dry_run;
    repair.remove_inconsistent_bitmaps = options.remove_inconsistent_bitmaps;
    repair.workers = options.workers;
    repair.memory_bytes = parse_size(options.memory);
    repair.control = control;
    repair.on_loss = [](const qcow::RepairLoss& loss) { complain("warning: " + qcow::text_of(loss)); };
    auto source = options.source;
    source.examines = !all;  // data that move may have to be encrypted again
    const auto result = QCOW_TRY(qcow::repair(QCOW_TRY(spec_of(source)), repair));
    if (result.unlisted_losses > 0) complain(fmt::format("warning: {} more losses", result.unlisted_losses));
    if (options.json) {
        auto json = report_json(result.after, options.source.path, qcow::Format::qcow2);
        json["leaks-fixed"] = result.leaks_fixed;
        json["corruptions-fixed"] = result.corruptions_fixed;
        json["copied-clusters"] = result.copied_clusters;
        json["refcounts-rebuilt"] = result.refcounts_rebuilt;
        json["postponed-fixed"] = result.postponed_fixed;
        json["dirty-cleared"] = result.cleared_dirty();
        json["corrupt-cleared"] = result.cleared_corrupt();
        json["removed-bitmaps"] = result.removed_bitmaps.size();
        json["removed-bitmap-names"] = result.removed_bitmaps;
        json["before"] = counts_json(result.before);
        json["dry-run"] = options.dry_run;
        json["losses"] = Json::array();
        for (const auto& loss : result.losses) json["losses"].push_back(loss_json(loss));
        print_json(json);
    } else {
        print_repair(result, options.dry_run);
        print_report(result.after, options.source.path);
    }
    return check_status(result.after);
}

qcow::Result<int> run_job(const CheckOptions& options) {
    const bool repairs = !options.repair.empty();
    // A check that only reads ends at once.
    const auto signals = repairs ? std::make_unique<StopOnSignals>() : nullptr;
    Progress progress(repairs ? "repairing" : "checking", options.progress);
    qcow::JobControl control;
    control.progress = [&](std::uint64_t done, std::uint64_t total) { progress.update(done, total); };
    control.warn = warn_on_stderr();
    if (signals) control.stop = signals->token();
    return repairs ? run_repair(options, control) : run_check(options, control);
}

/// Whether an image can be opened, but has a format that cannot be checked or repaired.
qcow::Result<bool> lacks_check(const Source& source) {
    auto spec = QCOW_TRY(spec_of(source));
    spec.follow = false;
    const auto image = qcow::open_image(spec);
    return image && (*image)->format() != qcow::Format::qcow2;
}

qcow::Result<int> run(const CheckOptions& options) {
    QCOW_TRY_VOID(verify_is_not_stdin(options.source.path));
    const auto done = run_job(options);
    if (done || done.error().code != qcow::Errc::unsupported || !QCOW_TRY(lacks_check(options.source))) return done;
    complain(done.error().message());
    return no_check;
}

}  // namespace

void declare_check(CLI::App& root, int& status) {
    const auto options = std::make_shared<CheckOptions>();
    auto& app = declare(
        root, status, "check", "Check the metadata of an image, and repair it",
        "Counts the references to each cluster and compares them with the refcounts. Verifies all tables, snapshots\n"
        "and bitmaps, and that the backing chain can be opened. Without -r, it changes nothing.\n"
        "An image that was not closed may have old refcounts and COPIED flags (\"postponed\"). They are not damage:\n"
        "opening the image for writing corrects them.\n"
        "With -r, it repairs a qcow2 image in place. Before it writes, it says what is lost: guest data whose place "
        "is\n"
        "unknown, and snapshots and bitmaps that cannot be read. A repair may be interrupted at any moment, and run\n"
        "again. It needs nobody else to use the image. Data that share a cluster with something else are copied. If\n"
        "they are encrypted with LUKS, they are encrypted again, which takes the key of the image.\n"
        "Exit status: 0 clean; 1 the check failed or could not verify everything; 2 corrupt; 3 only leaked clusters\n"
        "or postponed findings; 63 the format has no metadata to check. With -r, it is about the repaired image.\n"
        "Examples:\n"
        "  qcow check --json disk.qcow2 | jq .corruptions\n"
        "  qcow check -r all --dry-run disk.qcow2    what a repair would do\n"
        "  qcow check -r leaks disk.qcow2            give leaked clusters back",
        [options] { return run(*options); });
    add_source_options(app, options->source);
    options->source.examines = true;
    add_output_options(app, options->json, "Print JSON");
    app.add_flag("-p,--progress", options->progress, "Show progress even if standard error is not a terminal");
    auto* repair =
        app.add_option("-r,--repair", options->repair,
                       "Repair: \"leaks\" gives leaked clusters back, \"all\" repairs all that can be repaired")
            ->type_name("WHAT")
            ->check(CLI::IsMember({"leaks", "all"}));
    app.add_flag("--dry-run", options->dry_run, "Say what -r would do, and write nothing")->needs(repair);
    app.add_flag("--remove-inconsistent-bitmaps", options->remove_inconsistent_bitmaps,
                 "With -r all: remove bitmaps that are marked as inconsistent")
        ->needs(repair);
    add_workers_option(app, options->workers);
    app.add_option("--memory", options->memory, "Memory limit of the check")
        ->type_name("SIZE")
        ->check(size_text)
        ->capture_default_str();
}

}  // namespace tool
