// qcow check: is an image sound?

#include <fmt/format.h>

#include "command.h"
#include "progress.h"
#include "qcow/text.h"
#include "text.h"

namespace tool {
namespace {

constexpr int corrupt = 2;
constexpr int leaks_only = 3;

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
    }
    return "";
}

void print_report_json(const qcow::CheckReport& report, const std::string& path, qcow::Format format) {
    Json json = {{"filename", path},
                 {"format", qcow::format_name(format)},
                 {"check-errors", report.errors},
                 {"corruptions", report.corruptions},
                 {"leaks", report.leaks},
                 {"image-end-offset", report.image_end},
                 {"total-clusters", report.total_clusters},
                 {"allocated-clusters", report.allocated_clusters},
                 {"compressed-clusters", report.compressed_clusters},
                 {"fragmented-clusters", report.fragmented_clusters},
                 {"findings", Json::array()}};
    for (const auto& f : report.findings)
        json["findings"].push_back({{"severity", severity_name(f.severity)}, {"place", f.place}, {"what", f.what}});
    print_json(json);
}

double percent(std::uint64_t part, std::uint64_t whole) {
    return whole == 0 ? 0 : 100.0 * static_cast<double>(part) / static_cast<double>(whole);
}

void print_report(const qcow::CheckReport& report, const std::string& path) {
    using Severity = qcow::CheckFinding::Severity;
    for (const auto& f : report.findings) {
        fmt::print("{}: {}: {}\n",
                   paint(severity_name(f.severity), f.severity == Severity::leak ? Colour::yellow : Colour::red),
                   qcow::printable(f.place), qcow::printable(f.what));
    }
    const auto more =
        report.leaks + report.corruptions + report.errors -
        std::min<std::uint64_t>(report.findings.size(), report.leaks + report.corruptions + report.errors);
    if (more > 0) fmt::print("... and {} more\n", more);
    fmt::print("{} of {} clusters allocated ({:.1f}%), {:.1f}% of those compressed, {:.1f}% fragmented\n",
               report.allocated_clusters, report.total_clusters,
               percent(report.allocated_clusters, report.total_clusters),
               percent(report.compressed_clusters, report.allocated_clusters),
               percent(report.fragmented_clusters, report.allocated_clusters));
    fmt::print("in use up to host offset {:#x} ({})\n", report.image_end, human(report.image_end));
    if (report.clean()) {
        fmt::print("{}: {}\n", qcow::printable(path), paint("clean", Colour::green));
        return;
    }
    fmt::print("{}: {}\n", qcow::printable(path),
               paint(fmt::format("{} corruptions, {} leaked clusters, {} things that could not be checked",
                                 report.corruptions, report.leaks, report.errors),
                     report.corruptions + report.errors > 0 ? Colour::red : Colour::yellow));
    if (report.corruptions > 0) {
        fmt::print(
            "Do not write to the image. Copy out what is readable (qcow convert --salvage), and restore it from a "
            "backup if there is one.\n");
    } else if (report.leaks > 0) {
        fmt::print("Leaks waste space and endanger nothing.\n");
    }
}

qcow::Result<int> run(const Options& options) {
    auto image = open_source(options.source);
    qcow::CheckReport chain;
    if (!image) {
        // The image itself may be sound, or worth a diagnosis, although its chain is broken.
        auto alone = open_source(options.source, false);
        if (!alone) return std::unexpected(std::move(image).error());
        chain.errors = 1;
        chain.findings.push_back({qcow::CheckFinding::Severity::error, "backing chain", image.error().message()});
        image = std::move(alone);
    }
    Progress progress("checking", options.progress);
    qcow::CheckOptions check;
    check.workers = options.workers;
    check.memory_bytes = parse_size(options.memory);
    check.progress = [&](std::uint64_t done, std::uint64_t total) { progress.update(done, total); };
    auto report = (*image)->check(check);
    if (!report) {
        auto error = std::move(report).error();
        return std::unexpected(error.place.empty() ? std::move(error).in(options.source.path) : std::move(error));
    }
    report->errors += chain.errors;
    report->findings.insert(report->findings.begin(), chain.findings.begin(), chain.findings.end());

    if (options.json) {
        print_report_json(*report, options.source.path, (*image)->format());
    } else {
        print_report(*report, options.source.path);
    }
    if (report->corruptions > 0) return corrupt;
    if (report->errors > 0) return failed;
    return report->leaks > 0 ? leaks_only : ok;
}

}  // namespace

void declare_check(CLI::App& root, int& status) {
    const auto options = std::make_shared<Options>();
    auto& app =
        declare(root, status, "check", "Verify an image's metadata; nothing is changed",
                "Counts every reference to every cluster and holds them against the refcounts; verifies all tables,\n"
                "snapshots and bitmaps, and that the backing chain can be opened.\n"
                "Exit status: 0 clean, 1 the check itself failed, 2 corrupt, 3 leaked clusters but nothing worse.\n"
                "Example:\n"
                "  qcow check --json disk.qcow2 | jq .corruptions",
                [options] { return run(*options); });
    add_source_options(app, options->source);
    app.add_flag("--json", options->json, "Print JSON");
    app.add_flag("-p,--progress", options->progress, "Show progress even where standard error is no terminal");
    add_workers_option(app, options->workers);
    app.add_option("--memory", options->memory, "How much memory the check may take")
        ->type_name("SIZE")
        ->check(size_text)
        ->capture_default_str();
}

}  // namespace tool
