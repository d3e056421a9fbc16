#include "command.h"

#include <fmt/format.h>

#include <cmath>
#include <cstdio>
#include <filesystem>

#include "qcow/text.h"

namespace tool {
namespace {

std::optional<std::uint64_t> size_of(const std::string& text) {
    constexpr std::string_view suffixes = "kmgtpe";
    if (text.empty() || text[0] < '0' || text[0] > '9') return std::nullopt;
    const bool hex = text.starts_with("0x") || text.starts_with("0X");
    std::size_t end = 0;
    try {
        const std::uint64_t whole = std::stoull(text, &end, hex ? 16 : 10);
        if (end == text.size()) return whole;
        if (hex) return std::nullopt;
        // A suffix: fractions are fine, exact up to 2^53 units.
        const double value = std::stod(text, &end);
        const auto suffix = suffixes.find(static_cast<char>(std::tolower(static_cast<unsigned char>(text[end]))));
        if (end + 1 == text.size() && (text[end] == 'b' || text[end] == 'B')) return static_cast<std::uint64_t>(value);
        if (end + 1 != text.size() || suffix == std::string_view::npos) return std::nullopt;
        const double bytes = std::ldexp(value, 10 * (static_cast<int>(suffix) + 1));
        if (bytes >= std::ldexp(1.0, 63)) return std::nullopt;
        return static_cast<std::uint64_t>(std::llround(bytes));
    } catch (const std::exception&) {
        return std::nullopt;
    }
}

}  // namespace

const CLI::Validator size_text(
    [](std::string& text) -> std::string {
        if (size_of(text)) return {};
        return fmt::format(
            "\"{}\" is not a size: write bytes (4096, 0x1000) or a number with k, M, G, T, P or E (64k, 1.5G)", text);
    },
    "");

std::uint64_t parse_size(const std::string& text) { return size_of(text).value(); }

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
    app.set_version_flag("-V,--version", "qcow " QCOW_VERSION);
    app.set_help_flag("-h,--help", "Show this help; after a command, the help of that command");
    app.require_subcommand(1);
    app.footer(
        "Sizes and offsets are bytes, or numbers with k, M, G, T, P or E (powers of 1024): 64k, 1.5G.\n"
        "Exit status: 0 done, 1 failed or used wrongly; check has more, see qcow check --help.\n"
        "Examples:\n"
        "  qcow info disk.qcow2                what is this?\n"
        "  qcow check disk.qcow2               is it sound?\n"
        "  qcow convert disk.qcow2 disk.raw    get the contents out");

    for (const Declare declare_command :
         {declare_info, declare_map, declare_check, declare_create, declare_convert, declare_read, declare_write,
          declare_zero, declare_discard, declare_resize, declare_snapshot, declare_serve}) {
        declare_command(app, status);
    }
    return made;
}

CLI::App& declare(CLI::App& root, int& status, const std::string& name, const std::string& summary,
                  const std::string& help, std::function<qcow::Result<int>()> run) {
    auto& app = *root.add_subcommand(name, summary);
    app.footer(help);
    app.callback([&status, run = std::move(run)] {
        const auto result = run();
        if (!result) complain(result.error().message());
        status = result.value_or(failed);
    });
    return app;
}

namespace {

qcow::Gate gate_for(const std::string& path, bool untrusted, bool force_share, bool direct) {
    if (!untrusted) return qcow::local_files(force_share, direct);
    return qcow::files_beneath(std::filesystem::path(path).parent_path().string(), force_share, direct);
}

void add_format_option(CLI::App& app, std::string& format) {
    app.add_option("-f,--format", format, "Its format, instead of looking at its first bytes")
        ->check(CLI::IsMember({"raw", "qcow", "qcow2"}));
}

void warn(const std::string& message) { complain("warning: " + message); }

}  // namespace

void add_source_options(CLI::App& app, Source& source) {
    app.add_option("IMAGE", source.path, "The image: a file or block device")->required();
    add_open_options(app, source);
}

void add_open_options(CLI::App& app, Source& source) {
    add_format_option(app, source.format);
    app.add_flag("-U,--force-share", source.force_share,
                 "Read although another process may be writing it; what is seen may be inconsistent");
    app.add_flag("--no-backing", source.no_backing, "Refuse to open backing and data files that the image names");
    add_untrusted_option(app, source.untrusted);
}

void add_untrusted_option(CLI::App& app, bool& untrusted) {
    app.add_flag("--untrusted", untrusted,
                 "Images come from a stranger: the files that they name are opened only if they are regular files in\n"
                 "or below the directory of the image, and only if its format is said and not guessed");
}

qcow::OpenOptions open_options(const Source& source) {
    qcow::OpenOptions options;
    options.format = qcow::format_from_name(source.format);
    options.gate = source.no_backing ? qcow::no_files()
                                     : gate_for(source.path, source.untrusted, source.force_share, source.direct);
    options.warn = warn;
    return options;
}

qcow::Result<std::shared_ptr<qcow::Image>> open_source(const Source& source, bool follow) {
    auto storage = qcow::open_file(source.path, {.writable = false, .force_share = source.force_share});
    if (!storage) return std::unexpected(std::move(storage).error());
    auto options = open_options(source);
    options.follow = follow;
    return qcow::open_image(*std::move(storage), options);
}

qcow::Result<std::shared_ptr<qcow::Disk>> disk_of(const std::shared_ptr<qcow::Image>& image, const Source& source) {
    if (source.snapshot.empty()) return image;
    return image->snapshot(source.snapshot);
}

void add_target_options(CLI::App& app, Target& target) {
    app.add_option("IMAGE", target.path, "The image: a file or block device")->required();
    add_format_option(app, target.format);
    add_cache_option(app, target.cache);
    add_untrusted_option(app, target.untrusted);
}

CLI::Option* add_cache_option(CLI::App& app, std::string& cache) {
    return app
        .add_option(
            "--cache", cache,
            "writeback: written to the disk at the end; writethrough: at once, again and again; none: past the\n"
            "system's cache; unsafe: when the system likes")
        ->check(CLI::IsMember({"writeback", "writethrough", "none", "unsafe"}))
        ->capture_default_str();
}

qcow::Result<std::shared_ptr<qcow::Image>> open_target(const Target& target) {
    const bool direct = target.cache == "none";
    auto storage = qcow::open_file(target.path, {.writable = true, .direct = direct});
    if (!storage) return std::unexpected(std::move(storage).error());
    qcow::OpenOptions options;
    options.writable = true;
    if (target.cache == "writethrough") options.write.cache = qcow::CacheMode::writethrough;
    if (target.cache == "unsafe") options.write.cache = qcow::CacheMode::unsafe;
    options.format = qcow::format_from_name(target.format);
    options.gate = gate_for(target.path, target.untrusted, false, direct);
    options.warn = warn;
    return qcow::open_image(*std::move(storage), options);
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
    return std::unexpected(
        qcow::Error{qcow::Errc::invalid_argument, path,
                    fmt::format("{} bytes at {} reach past the end of the disk ({} bytes)", length, at, disk.size())});
}

}  // namespace tool
