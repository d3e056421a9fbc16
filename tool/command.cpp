#include "command.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>

#include "qcow/text.h"
#include "usage.h"

namespace tool {

const CLI::Validator path_of_new_file(
    [](std::string& name) -> std::string {
        const auto parsed = qcow::parse_location(name);
        if (!parsed) return parsed.error().message();
        name = parsed->path;
        return {};
    },
    "");

void complain(const std::string& message) {
    std::fflush(stdout);
    fmt::print(stderr, "qcow: {}\n", message);
}

void print_json(const Json& json) { fmt::print("{}\n", json.dump(2, ' ', true, Json::error_handler_t::replace)); }

std::unique_ptr<CLI::App> make_app(int& status) {
    auto made = std::make_unique<CLI::App>(
        "qcow inspects, checks, converts, changes and serves disk images: qcow2 (versions 2 and 3), qcow and raw.",
        "qcow");
    auto& app = *made;
    app.formatter(std::make_shared<Help>());
    app.set_version_flag("-V,--version", "qcow " QCOW_VERSION)->description("Show the version");
    app.set_help_flag("-h,--help", "Show this help, or with COMMAND the help of the command");
    app.require_subcommand(1);
    app.footer(
        "qcow COMMAND --help explains the command and its options.\n"
        "Sizes and offsets are bytes (4096, 0x1000) or numbers with k, M, G, T, P or E (powers of 1024): 64k, 1.5G.\n"
        "Exit status: 0 success; 1 failure or wrong usage. check, compare and convert have others:\n"
        "see their --help.\n"
        "Examples:\n"
        "  qcow info disk.qcow2                show what the image is\n"
        "  qcow check disk.qcow2               verify its metadata\n"
        "  qcow convert disk.qcow2 disk.raw    copy its contents into a raw file");

    for (const Declare declare_command :
         {declare_info, declare_map, declare_check, declare_compare, declare_digest, declare_create, declare_convert,
          declare_read, declare_write, declare_zero, declare_discard, declare_resize, declare_rebase, declare_snapshot,
          declare_serve}) {
        declare_command(app, status);
    }
    for (auto* command : app.get_subcommands({})) {
        command->get_option("--help")->description("Show this help");
        // The last value of a repeated option counts: scripts append the options of their user to their own.
        for (auto* option : command->get_options())
            if (option->nonpositional() && option->get_items_expected_max() == 1) option->take_last();
    }
    return made;
}

CLI::App& declare(CLI::App& root, int& status, const std::string& name, const std::string& summary,
                  const std::string& help, std::function<qcow::Result<int>()> run) {
    auto& app = *root.add_subcommand(name, summary)->group("Commands");
    app.footer(help);
    app.callback([&status, failure = failure_of(name), run = std::move(run)] {
        const auto result = run();
        if (!result) complain(result.error().message());
        status = result.value_or(failure);
    });
    return app;
}

int failure_of(std::string_view command) { return command == "compare" ? 2 : failed; }

void add_format_option(CLI::App& app, std::string& format, const std::string& name, const std::string& description) {
    one_of(app.add_option(name, format, description), {"raw", "qcow", "qcow2"});
}

void add_force_share_option(CLI::App& app, bool& force_share) {
    app.add_flag("-U,--force-share", force_share,
                 "Read without locks, even if another process is writing; the result may be inconsistent");
}

namespace {

void add_image_format_option(CLI::App& app, std::string& format) {
    add_format_option(app, format, "-f,--format", "Format of the image (default: guessed from its contents)");
}

}  // namespace

qcow::Result<void> verify_is_not_stdin(const std::string& path) {
    if (path != "-") return {};
    return std::unexpected(
        qcow::Error{qcow::Errc::invalid_argument, path,
                    "stands for standard input, but an image is not read from front to back; write it "
                    "into a file first (cat > FILE). A file with this name is \"./-\""});
}

qcow::Result<void> name_source(Source& source, const std::string& name) {
    source.location = QCOW_TRY(qcow::parse_location(name));
    source.path = source.location.path;
    return {};
}

void add_source_options(CLI::App& app, Source& source) {
    app.add_option("IMAGE", source.path, "Image file or block device")
        ->required()
        ->check(name_text)
        ->transform(CLI::Validator(
            [&source](std::string& name) -> std::string {
                if (auto named = name_source(source, name); !named) return named.error().message();
                name = source.path;
                return {};
            },
            ""));
    add_open_options(app, source);
}

void add_open_options(CLI::App& app, Source& source) {
    add_image_format_option(app, source.format);
    add_force_share_option(app, source.force_share);
    auto* backing =
        app.add_option("--backing", source.backing, "Use this backing file instead of the one that the image names")
            ->type_name("FILE")
            ->check(name_text);
    add_format_option(app, source.backing_format, "--backing-format",
                      "Format of the backing file (default: recorded in the image, else guessed from its contents)");
    app.add_flag("--no-backing", source.no_backing,
                 "Ignore the backing file: what the image does not store itself reads as zeros")
        ->excludes(backing);
    add_untrusted_option(app, source.untrusted);
}

void add_untrusted_option(CLI::App& app, bool& untrusted) {
    app.add_flag(
        "--untrusted", untrusted,
        "Do not trust the image: open the files that it names only if its format is given, and only if they are "
        "regular files in or below its directory");
}

CLI::Option* add_snapshot_option(CLI::App& app, Source& source, const std::string& description) {
    const CLI::Validator no_parameters(
        [](std::string& text) {
            const bool of_qemu = text.starts_with("snapshot.id=") || text.starts_with("snapshot.name=");
            return of_qemu ? "give only the id or name: " + text.substr(text.find('=') + 1) : std::string();
        },
        "");
    return app.add_option("-l,--snapshot", source.snapshot, description)
        ->type_name("NAME")
        ->check(name_text)
        ->check(no_parameters);
}

void add_workers_option(CLI::App& app, unsigned& workers) {
    app.add_option("-m,--workers", workers, "Number of threads (default: one per processor)")
        ->type_name("NUMBER")
        ->check(whole_number(1, 1024));
}

qcow::Result<qcow::ImageSpec> spec_of(const Source& source) {
    qcow::ImageSpec spec{.location = source.location};
    if (!source.format.empty()) spec.location.format = qcow::format_from_name(source.format);
    spec.location.alone |= source.no_backing;
    if (!source.backing.empty()) spec.backing = QCOW_TRY(qcow::parse_location(source.backing));
    spec.backing_format = qcow::format_from_name(source.backing_format);
    spec.force_share = source.force_share;
    spec.untrusted = source.untrusted;
    return spec;
}

qcow::Warn warn_on_stderr(std::string_view format_option) {
    return [=](const qcow::Warning& warning) {
        const auto* const prefix = warning.kind == qcow::Warning::Kind::rounded_size ? "" : "warning: ";
        const auto remedy = warning.format ? fmt::format("; if you mean {1}, use {0} {1}", format_option,
                                                         qcow::format_name(*warning.format))
                                           : "";
        complain(prefix + warning.message + remedy);
    };
}

qcow::Result<std::shared_ptr<qcow::Image>> open(const qcow::ImageSpec& spec) {
    QCOW_TRY_VOID(verify_is_not_stdin(spec.location.path));
    return qcow::open_image(spec, warn_on_stderr());
}

qcow::Result<std::shared_ptr<qcow::Image>> open_source(const Source& source, bool follow) {
    auto spec = QCOW_TRY(spec_of(source));
    spec.follow = follow;
    return open(spec);
}

qcow::Result<std::shared_ptr<qcow::Disk>> disk_of(const std::shared_ptr<qcow::Image>& image, const Source& source) {
    if (source.snapshot.empty()) return image;
    return image->snapshots().open(source.snapshot);
}

void add_target_options(CLI::App& app, Target& target) {
    app.add_option("IMAGE", target.path, "Image file or block device")
        ->required()
        ->check(name_text)
        ->transform(CLI::Validator(
            [&target](std::string& name) -> std::string {
                auto parsed = qcow::parse_location(name);
                if (!parsed) return parsed.error().message();
                if (parsed->alone) return "an image without its backing file can be only read";
                name = parsed->path;
                target.location = *std::move(parsed);
                return {};
            },
            ""));
    add_image_format_option(app, target.format);
    add_cache_option(app, target.cache);
    add_untrusted_option(app, target.untrusted);
}

CLI::Option* add_cache_option(CLI::App& app, std::string& cache) {
    return one_of(app.add_option(
                      "--cache", cache,
                      "When writes become durable. writeback: at the end; writethrough: each one at once; none: "
                      "at the end, without the page cache (direct I/O); unsafe: not before the system writes them"),
                  {"writeback", "writethrough", "none", "unsafe"})
        ->capture_default_str();
}

qcow::ImageSpec spec_of(const Target& target) {
    qcow::ImageSpec spec{.location = target.location};
    if (!target.format.empty()) spec.location.format = qcow::format_from_name(target.format);
    spec.untrusted = target.untrusted;
    set_cache(spec, target.cache);
    return spec;
}

void set_cache(qcow::ImageSpec& spec, const std::string& cache) {
    spec.write.emplace();
    if (cache == "writethrough") spec.write->cache = qcow::CacheMode::writethrough;
    if (cache == "unsafe") spec.write->cache = qcow::CacheMode::unsafe;
    spec.direct = cache == "none";
}

qcow::Result<void> verify_names_a_file(const std::string& path) {
    if (path != "-") return {};
    return std::unexpected(qcow::Error{qcow::Errc::invalid_argument, path,
                                       "stands for standard input or output, but a file is needed here. A file with "
                                       "this name is \"./-\""});
}

qcow::Result<int> change(const Target& target, const std::function<qcow::Result<void>(qcow::Image&)>& work) {
    const auto image = QCOW_TRY(open(spec_of(target)));
    QCOW_TRY_VOID(work(*image));
    QCOW_TRY_VOID(image->close());
    return ok;
}

qcow::Result<void> verify_range(const qcow::Disk& disk, const std::string& path, std::uint64_t at,
                                std::uint64_t length) {
    if (at <= disk.size() && length <= disk.size() - at) return {};
    const auto what =
        at > disk.size() ? fmt::format("offset {} lies", at) : fmt::format("{} bytes at {} reach", length, at);
    return std::unexpected(qcow::Error{qcow::Errc::invalid_argument, path,
                                       fmt::format("{} past the end of the disk ({} bytes)", what, disk.size())});
}

}  // namespace tool
