// qcow compare: compares the contents of two images.

#include "qcow/compare.h"

#include <fmt/format.h>

#include "command.h"
#include "progress.h"
#include "text.h"

namespace tool {
namespace {

constexpr int different = 1;

struct CompareOptions {
    Source a;
    Source b;
    bool strict = false;
    bool all = false;
    bool json = false;
    bool quiet = false;
    bool progress = false;
    unsigned workers = 0;
};

/// Returns the exit status that qemu-img has for an error in this step.
int compare_status(qcow::CompareStep failed_in) {
    switch (failed_in) {
        case qcow::CompareStep::opening: return 2;
        case qcow::CompareStep::mapping: return 3;
        case qcow::CompareStep::reading: return 4;
    }
    return 2;
}

std::string_view difference_name(qcow::Difference::Kind kind) {
    return kind == qcow::Difference::Kind::contents ? "contents" : "allocation";
}

/// Prints the line of a difference, for --all.
void print_difference(const qcow::Difference& difference, const CompareOptions& options, bool first) {
    const auto& [start, length] = difference.bytes;
    if (options.json) {
        fmt::print("{}\n    {{ \"start\": {}, \"length\": {}, \"kind\": \"{}\" }}", first ? "" : ",", start.value,
                   length, difference_name(difference.kind));
        return;
    }
    if (first) fmt::print("{}\n", paint("START                   LENGTH              DIFFERENCE", Colour::bold));
    fmt::print("{:#014x}  {:#14x}  {:>10}  {}\n", start.value, length, human(length), difference_name(difference.kind));
}

/// Returns the result as JSON, without the outer braces.
std::string facts(const qcow::CompareResult& result, const CompareOptions& options) {
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
                                    {"kind", difference_name(comparison.first->kind)}};
    }
    if (options.all) json["different-bytes"] = comparison.different_bytes;
    const auto text = json.dump(2, ' ', true, Json::error_handler_t::replace);
    return text.substr(2, text.size() - 4);
}

/// Prints the lines of qemu-img compare, or with --all a summary.
void print_verdict(const qcow::Comparison& comparison, const CompareOptions& options) {
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

qcow::Result<int> run(CompareOptions& options) {
    for (auto* source : {&options.a, &options.b}) {
        QCOW_TRY_VOID(name_source(*source, source->path));
        QCOW_TRY_VOID(verify_is_not_stdin(source->path));
        source->force_share = options.a.force_share;
        source->untrusted = options.a.untrusted;
        source->image_opts = options.a.image_opts;
        source->max_kdf_seconds = options.a.max_kdf_seconds;
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
        return compare_status(failed_in);
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
    const auto options = std::make_shared<CompareOptions>();
    auto& app = declare(
        root, status, "compare", "Compare the contents of two images",
        "Compares what a guest sees. Formats, allocation and backing chains may differ. If one disk is larger, the\n"
        "rest of it must be zeros.\n"
        "Prints the sector of 512 bytes with the first difference, as qemu-img compare does. With --json, prints the\n"
        "first byte. With --all, neighbouring sectors that differ are one run.\n"
        "Exit status: 0 equal; 1 different; 2 an image cannot be opened, or wrong usage; 3 the mapping cannot be\n"
        "read; 4 other errors, such as a failed read.\n"
        "Examples:\n"
        "  qcow compare disk.qcow2 disk.raw\n"
        "  qcow compare --all --json before.qcow2 after.qcow2 | jq '.differences[].start'",
        [options] { return run(*options); });
    app.add_option("A", options->a.path, "Image file or block device")->required()->check(name_text);
    app.add_option("B", options->b.path, "Image file or block device to compare with A")->required()->check(name_text);
    add_format_option(app, options->a.format, "-f,--format", "Format of A (default: guessed from its contents)");
    add_format_option(app, options->b.format, "-F,--other-format", "Format of B (default: guessed from its contents)");
    app.add_flag("-s,--strict", options->strict,
                 "Also compare sizes and allocation: whether data, zeros or nothing is stored, and whether compressed");
    app.add_flag("--all", options->all,
                 "List all runs that differ, and count the bytes, instead of only the first difference");
    add_force_share_option(app, options->a.force_share);
    add_untrusted_option(app, options->a.untrusted);
    app.add_flag("--image-opts", options->a.image_opts,
                 "A and B are lists of options: driver=FORMAT,file.filename=FILE,encrypt.key-secret=ID");
    add_encryption_options(app, options->a.max_kdf_seconds);
    app.add_flag("--json", options->json, "Print JSON");
    app.add_flag("-q,--quiet", options->quiet, "Print only errors; the exit status is the result");
    app.add_flag("-p,--progress", options->progress, "Show progress even if standard error is not a terminal");
    add_workers_option(app, options->workers);
}

}  // namespace tool
