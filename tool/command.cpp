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
        "qcow looks into, verifies, converts, changes and serves disk images: qcow2 (versions 2 and 3), qcow and raw.",
        "qcow");
    auto& app = *made;
    app.formatter(std::make_shared<Help>());
    app.set_version_flag("-V,--version", "qcow " QCOW_VERSION)->description("Show the version");
    app.set_help_flag("-h,--help", "Show this help; after a command, the help of that command");
    app.require_subcommand(1);
    app.footer(
        "qcow COMMAND --help shows what a command does and its options.\n"
        "Sizes and offsets are bytes (4096, 0x1000), or numbers with k, M, G, T, P or E (powers of 1024): 64k, 1.5G.\n"
        "Exit status: 0 done, 1 failed or used wrongly; check, compare and convert have\n"
        "more, see their --help.\n"
        "Examples:\n"
        "  qcow info disk.qcow2                what is this?\n"
        "  qcow check disk.qcow2               is it sound?\n"
        "  qcow convert disk.qcow2 disk.raw    get the contents out");

    for (const Declare declare_command :
         {declare_info, declare_map, declare_check, declare_compare, declare_digest, declare_create, declare_convert,
          declare_read, declare_write, declare_zero, declare_discard, declare_resize, declare_rebase, declare_snapshot,
          declare_serve}) {
        declare_command(app, status);
    }
    for (auto* command : app.get_subcommands({})) {
        command->get_option("--help")->description("Show this help");
        // Said again, an option has its last value: scripts put what a user wants behind what they want themselves.
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
                 "Read although another process may be writing it; what is seen may be inconsistent");
}

namespace {

void add_image_format_option(CLI::App& app, std::string& format) {
    add_format_option(app, format, "-f,--format", "Format of the image; otherwise it is guessed from its first bytes");
}

}  // namespace

qcow::Result<void> verify_is_not_stdin(const std::string& path) {
    if (path != "-") return {};
    return std::unexpected(qcow::Error{qcow::Errc::invalid_argument, path,
                                       "stands for standard input, and an image is read in any order; write it into a "
                                       "file first (cat > FILE). A file of that name is written \"./-\""});
}

qcow::Result<void> name_source(Source& source, const std::string& name) {
    source.location = QCOW_TRY(qcow::parse_location(name));
    source.path = source.location.path;
    return {};
}

void add_source_options(CLI::App& app, Source& source) {
    app.add_option("IMAGE", source.path, "The image: a file or block device")
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
    auto* backing = app.add_option("--backing", source.backing,
                                   "Take this file for the backing file, whatever the image calls its own")
                        ->type_name("FILE")
                        ->check(name_text);
    add_format_option(app, source.backing_format, "--backing-format",
                      "The format of the backing file, instead of what the image records; of one that --backing names\n"
                      "and the image records nothing of, it is guessed");
    app.add_flag("--no-backing", source.no_backing,
                 "Read the image alone: what it does not hold itself reads as zeros, whatever its backing file holds")
        ->excludes(backing);
    add_untrusted_option(app, source.untrusted);
}

void add_untrusted_option(CLI::App& app, bool& untrusted) {
    app.add_flag("--untrusted", untrusted,
                 "The image comes from a stranger: files that it names are opened only if they are regular files in or "
                 "below its directory, and only if its format is said");
}

CLI::Option* add_snapshot_option(CLI::App& app, Source& source, const std::string& description) {
    const CLI::Validator no_parameters(
        [](std::string& text) {
            const bool of_qemu = text.starts_with("snapshot.id=") || text.starts_with("snapshot.name=");
            return of_qemu ? "say the id or name alone: " + text.substr(text.find('=') + 1) : std::string();
        },
        "");
    return app.add_option("-l,--snapshot", source.snapshot, description)
        ->type_name("NAME")
        ->check(name_text)
        ->check(no_parameters);
}

void add_workers_option(CLI::App& app, unsigned& workers) {
    app.add_option("-m,--workers", workers, "Threads; by default one a processor")
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
        const auto remedy = warning.format ? fmt::format("; say {} {} if that is meant", format_option,
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
    return image->snapshot(source.snapshot);
}

void add_target_options(CLI::App& app, Target& target) {
    app.add_option("IMAGE", target.path, "The image: a file or block device")
        ->required()
        ->check(name_text)
        ->transform(CLI::Validator(
            [&target](std::string& name) -> std::string {
                auto parsed = qcow::parse_location(name);
                if (!parsed) return parsed.error().message();
                if (parsed->alone) return "an image without its backing file is not written";
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
                      "When writes reach the disk. writeback: at the end; writethrough: each one at once; none: "
                      "at the end, and past the system's cache; unsafe: when the system likes"),
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
                                       "stands for standard input or output, and a file is needed here; a file of "
                                       "that name is written \"./-\""});
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
