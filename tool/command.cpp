#include "command.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cstdio>
#include <filesystem>

#include "qcow/file_name.h"
#include "qcow/text.h"
#include "usage.h"

namespace tool {

const CLI::Validator path_of_new_file(
    [](std::string& name) -> std::string {
        const auto parsed = qcow::parse_file_name(name);
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
        "Exit status: 0 done, 1 failed or used wrongly; check and convert have more, see their --help.\n"
        "Examples:\n"
        "  qcow info disk.qcow2                what is this?\n"
        "  qcow check disk.qcow2               is it sound?\n"
        "  qcow convert disk.qcow2 disk.raw    get the contents out");

    for (const Declare declare_command :
         {declare_info, declare_map, declare_check, declare_create, declare_convert, declare_read, declare_write,
          declare_zero, declare_discard, declare_resize, declare_snapshot, declare_serve}) {
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
    app.callback([&status, run = std::move(run)] {
        const auto result = run();
        if (!result) complain(result.error().message());
        status = result.value_or(failed);
    });
    return app;
}

namespace {

/// Images are read in any order, and standard input is not.
qcow::Result<void> verify_is_not_stdin(const std::string& path) {
    if (path != "-") return {};
    return std::unexpected(qcow::Error{qcow::Errc::invalid_argument, path,
                                       "stands for standard input, and an image is read in any order; write it into a "
                                       "file first (cat > FILE). A file of that name is written \"./-\""});
}

qcow::Gate gate_for(const std::string& path, bool untrusted, bool force_share, bool direct) {
    if (!untrusted) return qcow::local_files(force_share, direct);
    return qcow::files_beneath(std::filesystem::path(path).parent_path().string(), force_share, direct);
}

void add_format_option(CLI::App& app, std::string& format, const std::string& name, const std::string& description) {
    one_of(app.add_option(name, format, description), {"raw", "qcow", "qcow2"});
}

void add_format_option(CLI::App& app, std::string& format) {
    add_format_option(app, format, "-f,--format", "Format of the image; otherwise it is guessed from its first bytes");
}

void warn(const std::string& message) { complain("warning: " + message); }

}  // namespace

qcow::Result<void> name_source(Source& source, const std::string& name) {
    auto parsed = qcow::parse_file_name(name);
    if (!parsed) return std::unexpected(std::move(parsed).error());
    source.path = std::move(parsed->path);
    if (source.format.empty() && parsed->format) source.format = qcow::format_name(*parsed->format);
    source.no_backing |= parsed->alone;
    return {};
}

void add_source_options(CLI::App& app, Source& source) {
    // Before --format, which outdoes what the name says.
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
    add_format_option(app, source.format);
    app.add_flag("-U,--force-share", source.force_share,
                 "Read although another process may be writing it; what is seen may be inconsistent");
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

qcow::OpenOptions open_options(const Source& source) {
    qcow::OpenOptions options;
    options.format = qcow::format_from_name(source.format);
    options.gate = gate_for(source.path, source.untrusted, source.force_share, source.direct);
    options.backing_format = qcow::format_from_name(source.backing_format);
    options.warn = warn;
    return options;
}

qcow::Result<void> add_backing(qcow::OpenOptions& options, const Source& source) {
    if (source.no_backing) options.backing = nullptr;
    if (source.backing.empty()) return {};
    const auto named = qcow::parse_file_name(source.backing);
    if (!named) return std::unexpected(named.error());
    auto storage = qcow::open_file(named->path, {.writable = false, .force_share = source.force_share});
    if (!storage) return std::unexpected(std::move(storage).error().in("backing file"));
    options.backing = *std::move(storage);
    if (!options.backing_format) options.backing_format = named->format;
    return {};
}

qcow::Result<std::shared_ptr<qcow::Image>> open_source(const Source& source, bool follow) {
    if (auto verified = verify_is_not_stdin(source.path); !verified)
        return std::unexpected(std::move(verified).error());
    auto storage = qcow::open_file(source.path, {.writable = false, .force_share = source.force_share});
    if (!storage) return std::unexpected(std::move(storage).error());
    auto options = open_options(source);
    options.follow = follow;
    if (auto added = add_backing(options, source); !added) return std::unexpected(std::move(added).error());
    return qcow::open_image(*std::move(storage), options);
}

qcow::Result<void> add_source(qcow::FilesInUse& in_use, const Source& source, const qcow::Image& image,
                              const std::string& role) {
    if (auto added = in_use.add(qcow::FilesInUse::Use::read, image, role); !added) return added;
    auto options = open_options(source);
    options.gate = gate_for(source.path, source.untrusted, true, false);
    return in_use.add_unopened(qcow::FilesInUse::Use::read, source.path, options, role);
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
                const auto parsed = qcow::parse_file_name(name);
                if (!parsed) return parsed.error().message();
                if (parsed->alone) return "an image without its backing file is not written";
                name = parsed->path;
                if (parsed->format) target.format = qcow::format_name(*parsed->format);
                return {};
            },
            ""));
    add_format_option(app, target.format);
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

qcow::Result<std::shared_ptr<qcow::Image>> open_for_writing(const std::string& path, bool direct,
                                                            const qcow::OpenOptions& options,
                                                            std::string_view format_option) {
    auto storage = qcow::open_file(path, {.writable = true, .direct = direct});
    if (!storage) return std::unexpected(std::move(storage).error());
    auto image = qcow::open_image(*std::move(storage), options);
    if (image && !options.format && (*image)->format() == qcow::Format::raw) {
        warn(fmt::format(
            "{}: that it is raw was only guessed, and what is written to it can change the next guess; say {} raw",
            qcow::printable(path), format_option));
    }
    return image;
}

qcow::Result<void> add_target(qcow::FilesInUse& in_use, const Target& target, const std::string& role) {
    qcow::OpenOptions options;
    options.format = qcow::format_from_name(target.format);
    options.gate = gate_for(target.path, target.untrusted, true, false);
    return in_use.add_unopened(qcow::FilesInUse::Use::written, target.path, options, role);
}

qcow::Result<std::shared_ptr<qcow::Image>> open_target(const Target& target) {
    if (auto verified = verify_is_not_stdin(target.path); !verified)
        return std::unexpected(std::move(verified).error());
    const bool direct = target.cache == "none";
    qcow::OpenOptions options;
    options.writable = true;
    if (target.cache == "writethrough") options.write.cache = qcow::CacheMode::writethrough;
    if (target.cache == "unsafe") options.write.cache = qcow::CacheMode::unsafe;
    options.format = qcow::format_from_name(target.format);
    options.gate = gate_for(target.path, target.untrusted, false, direct);
    options.warn = warn;
    return open_for_writing(target.path, direct, options, target.format_option);
}

void warn_of_ending(const std::string& path, const std::string& format, std::string_view format_option) {
    auto ending = std::filesystem::path(path).extension().string();
    for (auto& c : ending) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    constexpr auto endings =
        std::to_array<std::string_view>({".raw", ".qcow", ".qcow2", ".qed", ".vdi", ".vhd", ".vhdx", ".vmdk", ".vpc"});
    if (std::ranges::find(endings, ending) == endings.end() || ending == "." + format) return;
    const bool qcow2 = ending.starts_with(".qcow");
    if (qcow2 && format == "qcow2") return;
    const auto remedy = qcow2 || ending == ".raw"
                            ? fmt::format("say {} {} if that is meant", format_option, qcow2 ? "qcow2" : "raw")
                            : "qemu-img convert can make that";
    warn(fmt::format("{}: it will be {}, although its name says {}; {}", qcow::printable(path), format,
                     ending.substr(1), remedy));
}

qcow::Result<int> change(const Target& target, const std::function<qcow::Result<void>(qcow::Image&)>& work) {
    auto image = open_target(target);
    if (!image) return std::unexpected(std::move(image).error());
    if (auto done = work(**image); !done) return std::unexpected(std::move(done).error());
    if (auto closed = (*image)->close(); !closed) return std::unexpected(std::move(closed).error());
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
