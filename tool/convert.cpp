// qcow convert: copies the contents of images into a file.

#include <fmt/format.h>

#include <optional>
#include <span>

#include "command.h"
#include "create_options.h"
#include "failure.h"
#include "keys.h"
#include "progress.h"
#include "qcow/convert.h"
#include "qcow/stream.h"
#include "qcow/text.h"
#include "signals.h"
#include "text.h"
#include "usage.h"

namespace tool {
namespace {

/// The exit status of a salvage that could not read everything.
constexpr int lost_something = 3;

struct ConvertOptions {
    Source source;                   // how to open each source
    std::vector<std::string> paths;  // the sources, then the target
    std::string target;
    std::string target_format;  // empty: raw, or the format of an existing target
    bool existing = false;
    bool target_is_zero = false;
    std::string cache = "writeback";
    NewImageArguments image;
    std::string sparse = "4k";
    std::optional<int> level;
    unsigned workers = 0;
    bool compress = false;
    bool salvage = false;
    bool bitmaps = false;
    bool skip_broken_bitmaps = false;
    bool json = false;
    bool progress = false;
};

/// A new target.
qcow::Result<qcow::NewImage> new_target(const ConvertOptions& options) {
    if (options.cache != "writeback" && options.cache != "unsafe")
        return refuse("--cache " + options.cache, "works only with -n; a new file is flushed once, at the end");
    qcow::NewImage target;
    target.path = options.target;
    target.format = qcow::format_from_name(options.target_format).value_or(qcow::Format::raw);
    target.options = QCOW_TRY(parse_create_options(options.image, target.format, options.target));
    target.untrusted = options.source.untrusted;
    target.keys = key_source();
    target.verify = [target] { return verify_keys_are_needed(target); };
    if (options.cache == "unsafe") target.contents = qcow::NewFile::Contents::as_they_are;
    return target;
}

/// An existing target. Its backing file does not change: -B only says which it is.
qcow::Result<qcow::ConvertJob::ExistingTarget> existing_target(const ConvertOptions& options) {
    const auto& [made, backing, backing_format] = options.image;
    if (!made.empty())
        return refuse(options.target, "-n writes into an existing image, whose options do not change; leave out -o");
    if (backing.empty() && !backing_format.empty())
        return refuse("backing file format", "-F works only with -B, the backing file that has this format");
    qcow::ConvertJob::ExistingTarget target;
    Target existing;
    existing.path = existing.location.path = options.target;
    existing.format = options.target_format;
    existing.cache = options.cache;
    existing.untrusted = options.source.untrusted;
    existing.max_kdf_seconds = options.source.max_kdf_seconds;
    target.image = QCOW_TRY(spec_of(existing));
    target.reads_as_zeros = options.target_is_zero;
    if (!backing.empty()) {
        target.backing = QCOW_TRY(qcow::parse_location(backing, options.target));
        target.backing->format = qcow::format_from_name(backing_format);
    }
    return target;
}

/// A target that can be written only from front to back.
qcow::Result<qcow::ConvertJob::StreamTarget> stream_target(const ConvertOptions& options) {
    if (options.existing || (!options.target_format.empty() && options.target_format != "raw") ||
        !options.image.options.empty() || !options.image.backing.empty()) {
        return refuse(options.target,
                      "takes raw data only, because qcow2 images are not written from front to back; convert into a "
                      "file, then use cat FILE");
    }
    if (options.json) return refuse(options.target, "takes the data alone; to use --json, convert into a file");
    return qcow::ConvertJob::StreamTarget{options.target};
}

qcow::Result<std::vector<qcow::ConvertJob::Source>> sources(const ConvertOptions& options) {
    const auto paths = std::span(options.paths).first(options.paths.size() - 1);
    if (paths.empty()) return refuse("", "TARGET is missing; usage: qcow convert [OPTIONS] SOURCE... TARGET");
    if (paths.size() > 1 && !options.source.snapshot.empty())
        return refuse("option --snapshot", "works only with a single source");
    std::vector<qcow::ConvertJob::Source> sources;
    for (const auto& path : paths) {
        Source source = options.source;
        QCOW_TRY_VOID(name_source(source, path));
        QCOW_TRY_VOID(verify_is_not_stdin(source.path));
        sources.push_back({QCOW_TRY(spec_of(source)), source.snapshot});
    }
    return sources;
}

qcow::Result<qcow::ConvertJob> convert_job(const ConvertOptions& options) {
    qcow::ConvertJob job;
    job.sources = QCOW_TRY(sources(options));
    if (qcow::is_stream(options.target)) {
        job.target = QCOW_TRY(stream_target(options));
    } else if (options.existing) {
        job.target = QCOW_TRY(existing_target(options));
    } else {
        job.target = QCOW_TRY(new_target(options));
    }
    job.workers = options.workers;
    job.sparse_bytes = parse_size(options.sparse);
    job.compress = options.compress;
    job.level = options.level;
    job.salvage = options.salvage;
    using enum qcow::ConvertJob::Bitmaps;
    if (options.bitmaps) job.bitmaps = options.skip_broken_bitmaps ? all_but_broken : all;
    return job;
}

std::string_view reason_name(qcow::Errc code) { return code == qcow::Errc::io ? "io" : "corrupt"; }

void print_summary(const qcow::Losses& losses, std::uint64_t size, const ConvertOptions& options) {
    Json json = {{"target", options.target},
                 {"source-bytes", size},
                 {"lost-bytes", losses.bytes},
                 {"unlisted-lost-bytes", losses.unlisted_bytes},
                 {"lost", Json::array()}};
    for (const auto& [bytes, why] : losses.ranges) {
        json["lost"].push_back({{"start", bytes.start.value},
                                {"length", bytes.length},
                                {"reason", reason_name(why.code)},
                                {"error", why.message()}});
    }
    print_json(json);
}

void tell_losses(const qcow::Losses& losses, const ConvertOptions& options) {
    for (const auto& [bytes, why] : losses.ranges) {
        complain(fmt::format("lost: guest bytes {:#x} to {:#x} ({}): {}", bytes.start.value,
                             bytes.start.value + bytes.length - 1, human(bytes.length), why.message()));
    }
    if (losses.unlisted_bytes != 0) complain(fmt::format("lost: {} more bytes, not listed", losses.unlisted_bytes));
    complain(fmt::format("{}: {} could not be read and are zeros in this file", qcow::printable(options.target),
                         human_exact(losses.bytes)));
}

qcow::Result<int> run(const ConvertOptions& options) {
    const auto job = QCOW_TRY(convert_job(options));
    // What is new is removed. An image that was there is closed in order.
    std::optional<StopOnSignals> stop;
    if (std::holds_alternative<qcow::ConvertJob::ExistingTarget>(job.target)) stop.emplace();
    const auto converted = [&] {
        Progress progress("converting", options.progress);
        const CleanUpOnSignals clean_up;
        return qcow::convert(
            job, {.progress = [&](std::uint64_t done, std::uint64_t total) { progress.update(done, total); },
                  .warn = warn_on_stderr(options.existing ? "--target-format" : "-O"),
                  .stop = stop ? stop->token() : std::stop_token()});
    }();
    if (!converted) {
        if (converted.error().code == qcow::Errc::cancelled) complain(converted.error().message());
        return std::unexpected(converted.error());
    }
    const auto& losses = converted->losses;
    if (losses.bytes != 0) tell_losses(losses, options);
    if (options.json) print_summary(losses, converted->bytes, options);
    return losses.bytes == 0 ? ok : lost_something;
}

/// Shows the single positional option as what it stands for.
class SourcesAndTarget final : public Help {
public:
    std::string make_option_usage(const CLI::Option*) const override { return "SOURCE... TARGET"; }
};

}  // namespace

void declare_convert(CLI::App& root, int& status) {
    const auto options = std::make_shared<ConvertOptions>();
    auto& app = declare(
        root, status, "convert", "Copy the contents of images into a raw or qcow2 image",
        "The target gets its name only when it is complete. It then replaces a file with that name, and keeps its\n"
        "owner, group, permissions and extended attributes. A file that cannot be replaced is written in place.\n"
        "Files that the command reads, such as sources and backing files, are never overwritten.\n"
        "Zeros take no space. If the file system can share data between source and target, they are not copied.\n" +
            std::string(new_image_help) +
            "\nExit status: 0 success; 1 failure; 3 success, except for data that --salvage could not read.\n"
            "Examples:\n"
            "  qcow convert disk.qcow2 disk.raw\n"
            "  qcow convert -O qcow2 -c disk.raw disk.qcow2         compressed\n"
            "  qcow convert -O qcow2 -c -o compression_type=zstd disk.raw disk.qcow2\n"
            "  qcow convert -O qcow2 -B base.qcow2 -F qcow2 disk.raw overlay.qcow2    only what differs from base\n"
            "  qcow convert -n disk.raw disk.qcow2                  into an existing image\n"
            "  qcow convert -n -B base.qcow2 disk.raw overlay.qcow2 only what differs from base\n"
            "  qcow convert --salvage broken.qcow2 saved.raw        the readable data of a damaged image\n"
            "  qcow convert part1.raw part2.raw whole.raw           several sources, joined\n"
            "  qcow convert -l before-upgrade disk.qcow2 old.raw    one internal snapshot\n"
            "  qcow convert disk.qcow2 - | gzip > disk.raw.gz       raw data to standard output",
        [options] { return run(*options); });
    // One option for both, because CLI11 would give all values to SOURCE.
    app.formatter(std::make_shared<SourcesAndTarget>());
    app.add_option("SOURCE", options->paths,
                   "One or more image files or block devices, which are joined in this order; then the file to make, a "
                   "block device to overwrite, or for raw data a pipe or \"-\" (standard output)")
        ->required()
        ->check(name_text)
        ->option_text("... TARGET")
        ->each([options](const std::string& name) {
            options->target = name;
            path_of_new_file(options->target);  // an error is reported when the target is made
        });
    add_open_options(app, options->source);
    one_of(app.add_option("-O,--target-format", options->target_format,
                          "Format of the target (default: raw; with -n, guessed from its contents)"),
           {"raw", "qcow2", "luks"});
    add_snapshot_option(app, options->source, "Convert this internal snapshot (id or name)");
    auto* compress = app.add_flag("-c,--compress", options->compress, "Compress the target");
    app.add_option("--level", options->level,
                   "Compression level: zlib 1 (fast) to 9 (small), default 2; zstd 1 to 19, default 3")
        ->type_name("NUMBER")
        ->check(whole_number(1, 19))
        ->needs(compress);
    add_new_image_options(app, options->image);
    app.add_option("-B,--target-backing", options->image.backing,
                   "Backing file of the target, which stores only what differs. With -n, the target must have this\n"
                   "backing file already")
        ->type_name("FILE")
        ->check(name_text);
    add_backing_format_option(app, "-F,--target-backing-format", options->image);
    app.add_option("-S,--sparse", options->sparse,
                   "For raw targets and -n: runs of zeros of at least this size become holes. 0, for all targets:\n"
                   "every byte is written and has storage")
        ->type_name("SIZE")
        ->check(size_text)
        ->capture_default_str();
    auto* existing = app.add_flag("-n,--no-create", options->existing,
                                  "Write into an existing image, which must be at least as large as the sources");
    app.add_flag("--target-is-zero", options->target_is_zero,
                 "With -n: the target reads as zeros, so zeros are not written")
        ->needs(existing);
    app.add_flag("--salvage", options->salvage,
                 "Continue if data cannot be read: write zeros in their place, and list them at the end");
    auto* bitmaps = app.add_flag("--bitmaps", options->bitmaps, "Copy the persistent bitmaps of the source, too");
    app.add_flag("--skip-broken-bitmaps", options->skip_broken_bitmaps,
                 "With --bitmaps: leave out bitmaps that are damaged or in use")
        ->needs(bitmaps);
    app.add_flag("--json", options->json, "At the end, print the lost data as JSON");
    add_cache_option(app, options->cache);
    add_workers_option(app, options->workers);
    app.add_flag("-p,--progress", options->progress, "Show progress even if standard error is not a terminal");
}

}  // namespace tool
