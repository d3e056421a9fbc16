// qcow compare: do two images have the same contents?

#include "qcow/compare.h"

#include <fmt/format.h>

#include "command.h"
#include "progress.h"
#include "text.h"

namespace tool {
namespace {

constexpr int different = 1;

struct Options {
    Source a;
    Source b;
    bool strict = false;
    bool all = false;
    bool json = false;
    bool quiet = false;
    bool progress = false;
    unsigned workers = 0;
};

/// qemu-img's exit statuses.
int status_of(qcow::CompareStep failed_in) {
    switch (failed_in) {
        case qcow::CompareStep::opening: return 2;
        case qcow::CompareStep::mapping: return 3;
        case qcow::CompareStep::reading: return 4;
    }
    return 2;
}

std::string_view kind_name(qcow::Difference::Kind kind) {
    return kind == qcow::Difference::Kind::contents ? "contents" : "allocation";
}

/// The line of a difference, with --all.
void print_difference(const qcow::Difference& difference, const Options& options, bool first) {
    const auto& [start, length] = difference.bytes;
    if (options.json) {
        fmt::print("{}\n    {{ \"start\": {}, \"length\": {}, \"kind\": \"{}\" }}", first ? "" : ",", start.value,
                   length, kind_name(difference.kind));
        return;
    }
    if (first) fmt::print("{}\n", paint("START                   LENGTH              DIFFERENCE", Colour::bold));
    fmt::print("{:#014x}  {:#14x}  {:>10}  {}\n", start.value, length, human(length), kind_name(difference.kind));
}

/// The facts, without braces around them.
std::string facts(const qcow::CompareResult& result, const Options& options) {
    const auto image = [](const Source& source, qcow::Format format, std::uint64_t size) {
        return Json{{"filename", source.path}, {"format", qcow::format_name(format)}, {"virtual-size", size}};
    };
    const auto& comparison = result.comparison;
    Json json = {
        {"images",
         {image(options.a, result.format_a, comparison.size_a), image(options.b, result.format_b, comparison.size_b)}},
        {"identical", comparison.identical}};
    if (comparison.first) {
        json["first-difference"] = {{"offset", comparison.first->bytes.start.value},
                                    {"kind", kind_name(comparison.first->kind)}};
    }
    if (options.all) json["different-bytes"] = comparison.different_bytes;
    const auto text = json.dump(2, ' ', true, Json::error_handler_t::replace);
    return text.substr(2, text.size() - 4);
}

/// The lines of qemu-img compare; with --all one of its own.
void print_verdict(const qcow::Comparison& comparison, const Options& options) {
    const bool sizes_differ = comparison.size_a != comparison.size_b;
    const auto& first = comparison.first;
    const auto common_size = std::min(comparison.size_a, comparison.size_b);
    if (sizes_differ && options.strict) {
        fmt::print("Strict mode: Image size mismatch!\n");
    } else if (sizes_differ && (options.all || !first || first->bytes.start.value >= common_size)) {
        fmt::print("Warning: Image size mismatch!\n");
    }
    if (options.all && first) {
        fmt::print("{} differ, the first difference is at offset {}\n",
                   comparison.different_bytes == 1 ? "1 byte" : fmt::format("{} bytes", comparison.different_bytes),
                   first->bytes.start.value);
    } else if (first && first->kind == qcow::Difference::Kind::allocation) {
        fmt::print("Strict mode: Offset {} block status mismatch!\n", first->bytes.start.value);
    } else if (first) {
        fmt::print("Content mismatch at offset {}!\n",
                   first->bytes.start.value / qcow::sector_bytes * qcow::sector_bytes);
    } else if (comparison.identical) {
        fmt::print("Images are identical.\n");
    }
}

qcow::Result<int> run(Options& options) {
    for (auto* source : {&options.a, &options.b}) {
        QCOW_TRY_VOID(name_source(*source, source->path));
        QCOW_TRY_VOID(verify_is_not_stdin(source->path));
        source->force_share = options.a.force_share;
        source->untrusted = options.a.untrusted;
    }
    Progress progress("comparing", options.progress);
    auto failed_in = qcow::CompareStep::opening;
    bool none_printed = true;
    qcow::CompareOptions compare;
    compare.strict = options.strict;
    compare.workers = options.workers;
    compare.failed_in = &failed_in;
    compare.control.progress = [&](std::uint64_t done, std::uint64_t total) { progress.update(done, total); };
    compare.control.warn = warn_on_stderr();
    if (options.all) {
        compare.visit = [&](const qcow::Difference& difference) -> qcow::Result<void> {
            if (!options.quiet) print_difference(difference, options, std::exchange(none_printed, false));
            return {};
        };
    }
    const auto spec_a = QCOW_TRY(spec_of(options.a));
    const auto spec_b = QCOW_TRY(spec_of(options.b));
    const bool lists_json = options.json && options.all && !options.quiet;
    if (lists_json) fmt::print("{{\n  \"differences\": [");
    const auto result = qcow::compare(spec_a, spec_b, compare);
    if (lists_json) fmt::print("{}]", none_printed ? "" : "\n  ");
    if (!result) {
        if (lists_json) fmt::print("\n}}\n");
        complain(result.error().message());
        return status_of(failed_in);
    }
    if (options.json && !options.quiet) {
        fmt::print("{}\n{}\n}}\n", lists_json ? "," : "{", facts(*result, options));
    } else if (!options.quiet) {
        print_verdict(result->comparison, options);
    }
    return result->comparison.identical ? ok : different;
}

}  // namespace

void declare_compare(CLI::App& root, int& status) {
    const auto options = std::make_shared<Options>();
    auto& app = declare(
        root, status, "compare", "Say whether two images have the same contents",
        "Compares what a guest sees, whatever the formats, the allocation and the backing chains. If one disk is\n"
        "larger, the rest of it must be zeros.\n"
        "Prints the first difference as qemu-img compare does, which names the sector of 512 bytes. JSON has the\n"
        "byte. With --all, neighbouring sectors that differ are one run.\n"
        "Exit status: 0 the same, 1 different; errors: 2 cannot open an image (or wrong usage), 3 cannot look up\n"
        "where data are stored, 4 cannot read.\n"
        "Examples:\n"
        "  qcow compare disk.qcow2 disk.raw\n"
        "  qcow compare --all --json before.qcow2 after.qcow2 | jq '.differences[].start'",
        [options] { return run(*options); });
    app.add_option("A", options->a.path, "An image: a file or block device")->required()->check(name_text);
    app.add_option("B", options->b.path, "The image to compare it with")->required()->check(name_text);
    add_format_option(app, options->a.format, "-f,--format",
                      "Format of A; otherwise it is guessed from its first bytes");
    add_format_option(app, options->b.format, "-F,--other-format",
                      "Format of B; otherwise it is guessed from its first bytes");
    app.add_flag(
        "-s,--strict", options->strict,
        "Sizes and allocation must be the same, too: data, zeros or nothing stored, as they are or compressed");
    app.add_flag("--all", options->all, "Go on after the first difference: list all runs that differ, count the bytes");
    add_force_share_option(app, options->a.force_share);
    add_untrusted_option(app, options->a.untrusted);
    app.add_flag("--json", options->json, "Print JSON");
    app.add_flag("-q,--quiet", options->quiet, "Print nothing but errors; the exit status says it");
    app.add_flag("-p,--progress", options->progress, "Show progress even where standard error is no terminal");
    add_workers_option(app, options->workers);
}

}  // namespace tool
