// qcow compact: gives the unused space of an image back.

#include "qcow/compact.h"

#include <fmt/format.h>

#include "command.h"
#include "progress.h"
#include "qcow/text.h"
#include "text.h"

namespace tool {
namespace {

struct CompactOptions {
    Source source;
    bool zeroes = false;
    bool compress = false;
    std::optional<int> level;
    bool dry_run = false;
    bool json = false;
    bool progress = false;
    unsigned workers = 0;
};

void print_compacted(const qcow::CompactResult& result, const CompactOptions& options) {
    const auto path = qcow::printable(options.source.path);
    if (!result.changed) {
        fmt::print("{}: {}, nothing to give back\n", path, human(result.size_after));
        return;
    }
    if (result.size_after == result.size_before) {
        fmt::print("{}: the file keeps its length, {}\n", path, human(result.size_after));
    } else {
        fmt::print("{}: {} {} {}\n", path, human(result.size_before), options.dry_run ? "would become" : "became",
                   human(result.size_after));
    }
    fmt::print("{} leaked clusters, {} empty clusters; {} clusters and {} compressed clusters {}\n",
               result.leaked_clusters, result.unmapped_clusters, result.moved_clusters, result.moved_streams,
               options.dry_run ? "would move" : "moved");
    if (options.compress)
        fmt::print("{} clusters {} compressed\n", result.compressed_clusters, options.dry_run ? "would be" : "were");
}

Json result_json(const qcow::CompactResult& result, const CompactOptions& options) {
    return {{"filename", options.source.path},
            {"size-before", result.size_before},
            {"size-after", result.size_after},
            {"cluster-size", result.cluster_size},
            {"leaked-clusters", result.leaked_clusters},
            {"unmapped-clusters", result.unmapped_clusters},
            {"newly-compressed-clusters", result.compressed_clusters},
            {"moved-clusters", result.moved_clusters},
            {"moved-compressed-clusters", result.moved_streams},
            {"changed", result.changed},
            {"dry-run", options.dry_run}};
}

qcow::Result<int> run(const CompactOptions& options) {
    QCOW_TRY_VOID(verify_is_not_stdin(options.source.path));
    const StopOnSignals signals;
    Progress progress("compacting", options.progress);
    qcow::CompactJob job;
    job.image = QCOW_TRY(spec_of(options.source));
    job.zeroes = options.zeroes;
    job.compress = options.compress;
    job.level = options.level;
    job.dry_run = options.dry_run;
    job.workers = options.workers;
    qcow::JobControl control;
    control.progress = [&](std::uint64_t done, std::uint64_t total) { progress.update(done, total); };
    control.warn = warn_on_stderr();
    control.stop = signals.token();
    const auto result = QCOW_TRY(qcow::compact(job, control));
    if (options.json) {
        print_json(result_json(result, options));
    } else {
        print_compacted(result, options);
    }
    return ok;
}

}  // namespace

void declare_compact(CLI::App& root, int& status) {
    const auto options = std::make_shared<CompactOptions>();
    auto& app = declare(
        root, status, "compact", "Give the unused space of an image back, in place",
        "Clusters at the end of the file move into free ones in front, and the file is cut. The contents of the disk,\n"
        "its snapshots and its bitmaps stay. It needs little free space on the file system, and nobody else may use\n"
        "the image. It may be interrupted at any moment, and run again.\n"
        "Only space that the guest has given back is free: trim in the guest first, or use --zeroes.\n"
        "A damaged image is refused: repair it with qcow check -r all.\n"
        "Data that are encrypted with LUKS are encrypted again as they move, which takes the key of the image. To\n"
        "find zeros in an encrypted image takes it, too. Encrypted data are not compressed: they would be readable.\n"
        "Examples:\n"
        "  qcow compact --dry-run disk.qcow2    how much it would give back\n"
        "  qcow compact --zeroes disk.qcow2     give back clusters that hold only zeros, too",
        [options] { return run(*options); });
    add_source_options(app, options->source);
    app.add_flag("--zeroes", options->zeroes, "Also give clusters back that hold only zeros");
    auto* compress = app.add_flag("--compress", options->compress, "Also compress the data clusters");
    app.add_option("--level", options->level,
                   "Compression level: zlib 1 (fast) to 9 (small), default 2; zstd 1 to 19, default 3")
        ->needs(compress);
    app.add_flag("--dry-run", options->dry_run, "Say what would be given back, and write nothing");
    app.add_flag("--json", options->json, "Print JSON");
    app.add_flag("-p,--progress", options->progress, "Show progress even if standard error is not a terminal");
    add_workers_option(app, options->workers);
}

}  // namespace tool
