// qcow build: makes a disk from directories, archives and other disks.

#include "qcow/build.h"

#include <fmt/format.h>

#include <cerrno>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>

#include "command.h"
#include "create_options.h"
#include "failure.h"
#include "keys.h"
#include "progress.h"
#include "qcow/text.h"
#include "signals.h"
#include "text.h"

namespace tool {
namespace {

struct BuildOptions {
    std::vector<std::string> sources;  // the specification, or the layers of --fs
    std::string output;
    std::string filesystem;  // empty: a specification
    std::string directory;
    std::string size;
    std::string label;
    std::string owner;
    std::string seed;
    std::string free;
    std::string target_format;
    NewImageArguments image;
    bool compress = false;
    std::optional<int> level;
    bool untrusted = false;
    bool json = false;
    bool quiet = false;
    bool progress = false;
    unsigned workers = 0;
};

/// Reads a specification. What is longer than any may be cut, and is refused when it is parsed.
qcow::Result<std::string> text_of_file(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::string text(qcow::longest_build_spec + 1, '\0');
    file.read(text.data(), static_cast<std::streamsize>(text.size()));
    text.resize(static_cast<std::size_t>(file.gcount()));
    if (file.is_open() && !file.bad()) return text;
    const bool missing = !std::filesystem::exists(path);
    return std::unexpected(qcow::Error{missing ? qcow::Errc::not_found : qcow::Errc::io, qcow::printable(path),
                                       missing ? "there is no such specification; to build a file system from a "
                                                 "directory, use --fs"
                                               : "cannot be read"});
}

const std::map<std::string, qcow::FilesystemSpec::Type> filesystem_types = {
    {"ext2", qcow::FilesystemSpec::Type::ext2},   {"ext3", qcow::FilesystemSpec::Type::ext3},
    {"ext4", qcow::FilesystemSpec::Type::ext4},   {"fat12", qcow::FilesystemSpec::Type::fat12},
    {"fat16", qcow::FilesystemSpec::Type::fat16}, {"fat32", qcow::FilesystemSpec::Type::fat32},
    {"vfat", qcow::FilesystemSpec::Type::vfat},
};

/// The specification that --fs and its options stand for.
qcow::Result<qcow::BuildSpec> spec_of_filesystem(const BuildOptions& options) {
    qcow::FilesystemSpec filesystem;
    filesystem.type = filesystem_types.at(options.filesystem);
    filesystem.sources = options.sources;
    filesystem.label = options.label;
    filesystem.root_owns_all = options.owner == "root";
    if (!options.size.empty()) filesystem.size = parse_size(options.size);
    if (options.free.ends_with('%')) {
        filesystem.free_percent = static_cast<unsigned>(parse_size(options.free.substr(0, options.free.size() - 1)));
    } else if (!options.free.empty()) {
        filesystem.free_bytes = parse_size(options.free);
    }
    qcow::BuildSpec spec;
    spec.seed = options.seed;
    spec.filesystem = std::move(filesystem);
    return spec;
}

qcow::Result<qcow::BuildSpec> spec_of_file(const BuildOptions& options) {
    if (options.sources.size() != 1)
        return refuse("SPEC", "is a single file; to build a file system from several directories, use --fs");
    for (const auto* given : {&options.size, &options.label, &options.owner, &options.free}) {
        if (!given->empty()) return refuse("--size, --label, --owner, --free", "work only with --fs");
    }
    const auto& path = options.sources.front();
    if (std::filesystem::is_directory(path))
        return refuse(qcow::printable(path), "is a directory; to build a file system from it, use --fs ext4");
    const auto text = QCOW_TRY(text_of_file(path));
    const auto directory =
        options.directory.empty() ? std::filesystem::path(path).parent_path().string() : options.directory;
    auto spec = QCOW_TRY(qcow::parse_build_spec(text, path, directory));
    if (!options.seed.empty()) spec.seed = options.seed;
    return spec;
}

/// SOURCE_DATE_EPOCH, by which builds say which time they have.
qcow::Result<std::optional<std::int64_t>> time_of_build() {
    const char* given = std::getenv("SOURCE_DATE_EPOCH");
    if (given == nullptr || *given == '\0') return std::nullopt;
    std::int64_t time = 0;
    const auto* end = given + std::strlen(given);
    const auto [last, error] = std::from_chars(given, end, time);
    if (error != std::errc() || last != end || time < 0)
        return refuse("SOURCE_DATE_EPOCH", "wants a number of seconds since 1970");
    return time;
}

qcow::Format format_of(const BuildOptions& options) {
    if (!options.target_format.empty()) return *qcow::format_from_name(options.target_format);
    return options.output.ends_with(".qcow2") ? qcow::Format::qcow2 : qcow::Format::raw;
}

qcow::Result<qcow::BuildJob> build_job(const BuildOptions& options) {
    QCOW_TRY_VOID(verify_names_a_file(options.output));
    qcow::BuildJob job;
    job.spec = QCOW_TRY(options.filesystem.empty() ? spec_of_file(options) : spec_of_filesystem(options));
    job.target.path = options.output;
    job.target.format = format_of(options);
    job.target.options = QCOW_TRY(parse_create_options(options.image, job.target.format, options.output));
    job.target.untrusted = options.untrusted;
    job.target.keys = key_source();
    job.target.verify = [target = job.target] { return verify_keys_are_needed(target); };
    job.keys = key_source();
    if (options.filesystem.empty()) job.inputs = options.sources;
    job.compress = options.compress;
    job.level = options.level;
    job.workers = options.workers;
    job.time = QCOW_TRY(time_of_build());
    return job;
}

void print_built(const qcow::BuildResult& result, const BuildOptions& options) {
    if (options.json) {
        Json parts = Json::array();
        for (const auto& part : result.parts) {
            parts.push_back({{"name", part.name},
                             {"offset", part.offset},
                             {"size", part.size},
                             {"files", part.files},
                             {"free", part.free}});
        }
        print_json({{"filename", result.path}, {"virtual-size", result.size}, {"parts", std::move(parts)}});
        return;
    }
    if (options.quiet) return;
    fmt::print("{}: {}\n", qcow::printable(result.path), human_exact(result.size));
    if (result.parts.size() == 1 && result.parts.front().offset == 0) {
        fmt::print("{} files, {} free\n", result.parts.front().files, human(result.parts.front().free));
        return;
    }
    Table table({{"PARTITION"},
                 {"NAME"},
                 {"OFFSET", Table::Align::right},
                 {"SIZE", Table::Align::right},
                 {"FILES", Table::Align::right},
                 {"FREE", Table::Align::right}});
    for (const auto& part : result.parts) {
        table.add({fmt::to_string(&part - result.parts.data() + 1), qcow::printable(part.name), human(part.offset),
                   human(part.size), fmt::to_string(part.files), human(part.free)});
    }
    table.print();
}

qcow::Result<int> run(const BuildOptions& options) {
    const auto job = QCOW_TRY(build_job(options));
    const auto built = [&] {
        Progress progress("building", options.progress);
        const CleanUpOnSignals clean_up;
        return qcow::build(job,
                           {.progress = [&](std::uint64_t done, std::uint64_t total) { progress.update(done, total); },
                            .warn = warn_on_stderr("-O")});
    }();
    if (!built) return std::unexpected(built.error());
    print_built(*built, options);
    return ok;
}

}  // namespace

void declare_build(CLI::App& root, int& status) {
    const auto options = std::make_shared<BuildOptions>();
    auto& app = declare(
        root, status, "build", "Build a disk from directories, archives and other disks",
        "SPEC is a file in TOML that says which partitions and file systems the disk has, and what is in them.\n"
        "docs/build.md describes it. With --fs, the disk is one file system without partition table, and each\n"
        "SPEC is a directory, a tar archive, an image, or IMAGE:N (its partition N) instead; several are layers.\n"
        "Nothing is mounted, and no rights are needed. The same sources give the same bytes. The environment\n"
        "variable SOURCE_DATE_EPOCH sets the time of the build: no file is newer.\n"
        "The disk gets its name only when it is complete. If the files do not fit, nothing is written.\n"
        "Examples:\n"
        "  qcow build disk.toml -o disk.qcow2               partitions and file systems of a specification\n"
        "  qcow build --fs ext4 tree -o root.raw            a file system as large as the tree requires\n"
        "  qcow build --fs ext4 tree -o root.qcow2 --size 2G --label root --owner root -c\n"
        "  qcow build --fs ext4 base.tar.gz app.tar -o root.qcow2     layers of a container\n"
        "  qcow build --fs ext4 tree -o new.qcow2 -B old.qcow2 -F qcow2    only what differs from old",
        [options] { return run(*options); });
    app.add_option("SPEC", options->sources, "The specification; with --fs, the sources of the file system")
        ->required()
        ->check(name_text)
        ->type_name("FILE");
    app.add_option("-o,--output", options->output, "The image to make, or a block device to overwrite")
        ->required()
        ->type_name("DISK")
        ->check(name_text)
        ->transform(path_of_new_file);
    auto* filesystem =
        one_of(app.add_option("--fs", options->filesystem, "Build this file system, without a specification"), [] {
            std::vector<std::string> names;
            names.reserve(filesystem_types.size());
            for (const auto& [name, type] : filesystem_types) names.emplace_back(name);
            return names;
        }());
    app.add_option("--size", options->size, "Size of the file system (default: fitted to the sources)")
        ->type_name("SIZE")
        ->check(size_text)
        ->needs(filesystem);
    app.add_option("--free", options->free, "Space to leave free when the size is fitted: a size, or a percentage")
        ->type_name("SIZE")
        ->check([](const std::string& text) {
            constexpr std::uint64_t most = 10000;
            if (!text.ends_with('%')) return size_text(text);
            const auto number = text.substr(0, text.size() - 1);
            const bool digits = number.find_first_not_of("0123456789") == std::string::npos;
            if (!number.empty() && number.size() < 6 && digits && parse_size(number) <= most) return std::string();
            return "\"" + text + "\" is no percentage; write a whole number, such as 10%";
        })
        ->needs(filesystem);
    app.add_option("--label", options->label, "Label of the file system")->type_name("TEXT")->needs(filesystem);
    one_of(app.add_option("--owner", options->owner, "Owner of all files (default: as in the sources)"), {"root"})
        ->needs(filesystem);
    app.add_option("--directory", options->directory,
                   "Directory for relative names in SPEC (default: the directory of SPEC)")
        ->type_name("DIRECTORY")
        ->excludes(filesystem);
    app.add_option("--seed", options->seed, "Text that UUIDs are derived from (default: specification and files)")
        ->type_name("TEXT");
    one_of(app.add_option("-O,--target-format", options->target_format,
                          "Format of the disk (default: qcow2 if its name ends with .qcow2, else raw)"),
           {"raw", "qcow2"});
    auto* compress = app.add_flag("-c,--compress", options->compress, "Compress the disk");
    app.add_option("--level", options->level,
                   "Compression level: zlib 1 (fast) to 9 (small), default 2; zstd 1 to 19, default 3")
        ->type_name("NUMBER")
        ->check(whole_number(1, 19))
        ->needs(compress);
    add_options_option(app, options->image.options, "Options of the image: name=value,... as for qcow create -o",
                       "--option");
    app.add_option("-B,--target-backing", options->image.backing,
                   "Backing file of the disk, which stores only what differs")
        ->type_name("FILE")
        ->check(name_text);
    add_backing_format_option(app, "-F,--target-backing-format", options->image);
    add_untrusted_option(app, options->untrusted);
    add_key_options(app);
    app.add_flag("--json", options->json, "Print JSON");
    app.add_flag("-q,--quiet", options->quiet, "Print nothing if the disk was built");
    app.add_flag("-p,--progress", options->progress, "Show progress even if standard error is not a terminal");
    add_workers_option(app, options->workers);
}

}  // namespace tool
