// qcow digest: computes and verifies checksums of the contents of images.

#include "qcow/digest.h"

#include <fmt/format.h>

#include <fstream>
#include <iostream>
#include <optional>
#include <vector>

#include "command.h"
#include "progress.h"
#include "qcow/text.h"
#include "text.h"

namespace tool {
namespace {

struct DigestOptions {
    Source source;  // how to open each image
    std::vector<std::string> names;
    std::string algorithm = "sha256";
    std::string check;  // the file of digests to verify; empty: print digests
    bool json = false;
    bool quiet = false;
    bool silent = false;
    bool progress = false;
    unsigned workers = 0;
};

std::string hex(const std::vector<std::byte>& bytes) {
    std::string text;
    for (const auto byte : bytes) text += fmt::format("{:02x}", std::to_integer<unsigned>(byte));
    return text;
}

qcow::Result<qcow::DigestResult> digest_of(const DigestOptions& options, const std::string& name) {
    Source source = options.source;
    QCOW_TRY_VOID(name_source(source, name));
    QCOW_TRY_VOID(verify_is_not_stdin(source.path));
    Progress progress("hashing", options.progress);
    qcow::DigestOptions digest{.algorithm = options.algorithm, .workers = options.workers};
    digest.control.progress = [&](std::uint64_t done, std::uint64_t total) { progress.update(done, total); };
    digest.control.warn = warn_on_stderr();
    return qcow::digest({QCOW_TRY(spec_of(source)), source.snapshot}, digest);
}

// ---- lines in the format of sha256sum: the digest, two spaces, the name. ----
// Line breaks and backslashes in a name are escaped. The line then begins with a backslash.

std::string escaped(const std::string& name) {
    std::string text;
    for (const char c : name) {
        if (c == '\\') text += "\\\\";
        if (c == '\n') text += "\\n";
        if (c == '\r') text += "\\r";
        if (c != '\\' && c != '\n' && c != '\r') text += c;
    }
    return text;
}

/// Returns the name without escapes, or nothing if `text` has an unknown escape.
std::optional<std::string> unescaped(std::string_view text) {
    std::string name;
    for (std::size_t i = 0; i < text.size(); ++i) {
        if (text[i] != '\\') {
            name += text[i];
            continue;
        }
        if (++i == text.size()) return std::nullopt;
        if (text[i] != '\\' && text[i] != 'n' && text[i] != 'r') return std::nullopt;
        name += text[i] == 'n' ? '\n' : text[i] == 'r' ? '\r' : '\\';
    }
    return name;
}

struct Line {
    std::string digest;  // in lower case
    std::string name;
};

/// Returns nothing if `text` is not a line with a digest of `digest_bytes` bytes.
std::optional<Line> parse_line(std::string_view text, std::size_t digest_bytes) {
    const bool escapes = text.starts_with('\\');
    if (escapes) text.remove_prefix(1);
    const std::size_t digits = 2 * digest_bytes;
    if (text.size() < digits + 3 || text[digits] != ' ' || (text[digits + 1] != ' ' && text[digits + 1] != '*'))
        return std::nullopt;
    Line line;
    for (const char c : text.substr(0, digits)) {
        if (std::isxdigit(static_cast<unsigned char>(c)) == 0) return std::nullopt;
        line.digest += static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    }
    text.remove_prefix(digits + 2);
    if (!escapes) {
        line.name = text;
        return line;
    }
    auto name = unescaped(text);
    if (!name) return std::nullopt;
    line.name = *std::move(name);
    return line;
}

qcow::Result<int> print_digests(const DigestOptions& options) {
    Json json = Json::array();
    int status = ok;
    for (const auto& name : options.names) {
        const auto result = digest_of(options, name);
        if (!result) {
            complain(result.error().message());
            status = failed;
        } else if (options.json) {
            json.push_back({{"filename", name},
                            {"format", qcow::format_name(result->format)},
                            {"virtual-size", result->size},
                            {"algorithm", options.algorithm},
                            {"digest", hex(result->digest)}});
        } else {
            const auto shown = escaped(name);
            fmt::print("{}{}  {}\n", shown == name ? "" : "\\", hex(result->digest), shown);
        }
    }
    if (options.json) print_json(json);
    return status;
}

/// "2 digests do" or "1 digest does"
std::string counted(unsigned count, std::string_view noun, std::string_view verb_of_one, std::string_view verb) {
    return count == 1 ? fmt::format("1 {} {}", noun, verb_of_one) : fmt::format("{} {}s {}", count, noun, verb);
}

qcow::Result<int> check_digests(const DigestOptions& options) {
    const auto digest_bytes = QCOW_TRY(qcow::digest_size(options.algorithm));
    const auto refuse = [&](const char* what) {
        return std::unexpected(qcow::Error{qcow::Errc::invalid_argument, options.check, what});
    };
    std::ifstream file;
    if (options.check != "-") file.open(options.check);
    std::istream& lines = options.check == "-" ? std::cin : file;
    if (!lines) return refuse("cannot be opened");
    unsigned checked = 0;
    unsigned malformed = 0;
    unsigned unreadable = 0;
    unsigned wrong = 0;
    for (std::string text; std::getline(lines, text);) {
        if (text.ends_with('\r')) text.pop_back();
        if (text.empty() || text.starts_with('#')) continue;
        const auto line = parse_line(text, digest_bytes);
        if (!line) {
            ++malformed;
            continue;
        }
        ++checked;
        const auto result = digest_of(options, line->name);
        const bool right = result && hex(result->digest) == line->digest;
        if (!result) {
            complain(result.error().message());
            ++unreadable;
        } else if (!right) {
            ++wrong;
        }
        if (options.silent || (right && options.quiet)) continue;
        fmt::print("{}: {}\n", qcow::printable(line->name),
                   right    ? paint("OK", Colour::green)
                   : result ? paint("FAILED", Colour::red)
                            : paint("FAILED open or read", Colour::red));
    }
    if (lines.bad()) return refuse("cannot be read");
    if (checked == 0) return refuse("has no line with a digest of this algorithm; give the right one with --algorithm");
    if (!options.silent) {
        const auto warn = [](const std::string& what) { complain("warning: " + what); };
        if (malformed != 0) warn(counted(malformed, "line", "is improperly formatted", "are improperly formatted"));
        if (unreadable != 0) warn(counted(unreadable, "listed image", "could not be read", "could not be read"));
        if (wrong != 0) warn(counted(wrong, "computed digest", "did NOT match", "did NOT match"));
    }
    return unreadable + wrong == 0 ? ok : failed;
}

qcow::Result<int> run(const DigestOptions& options) {
    const auto refuse = [](const char* place, const char* what) {
        return std::unexpected(qcow::Error{qcow::Errc::invalid_argument, place, what});
    };
    if (options.check.empty() && options.names.empty())
        return refuse("", "IMAGE is missing; usage: qcow digest [OPTIONS] IMAGE...");
    if (!options.check.empty() && !options.names.empty())
        return refuse("option --check", "its file names the images; leave out IMAGE");
    if (!options.check.empty() && options.json) return refuse("option --json", "cannot be used with --check");
    return options.check.empty() ? print_digests(options) : check_digests(options);
}

}  // namespace

void declare_digest(CLI::App& root, int& status) {
    const auto options = std::make_shared<DigestOptions>();
    auto& app = declare(
        root, status, "digest", "Print or verify checksums of the contents of images",
        "A digest depends only on what a guest sees. The same contents have the same digest in any format, allocation\n"
        "and backing chain. It is the hash of the hashes of all blocks of 64 KiB and of the size. Holes and zeros are\n"
        "not read.\n"
        "Prints lines in the format of sha256sum. --check prints OK or FAILED for each line of FILE.\n"
        "Exit status: 0 success, and all digests match; 1 a digest does not match, or an image cannot be read.\n"
        "Examples:\n"
        "  qcow digest disk.qcow2 disk.raw > DIGESTS\n"
        "  qcow digest --check DIGESTS",
        [options] { return run(*options); });
    app.add_option("IMAGE", options->names, "Image files or block devices")->check(name_text);
    app.add_option("--algorithm", options->algorithm, "Hash function: any that openssl list -digest-algorithms shows")
        ->type_name("NAME")
        ->check(name_text)
        ->capture_default_str();
    app.add_option("--check", options->check, "Verify the digests in this file; \"-\" is standard input")
        ->type_name("FILE")
        ->check(name_text);
    app.add_flag("--quiet", options->quiet, "With --check: print only digests that do not match");
    app.add_flag("--status", options->silent, "With --check: print only errors; the exit status is the result");
    add_open_options(app, options->source);
    add_snapshot_option(app, options->source, "Read this internal snapshot (id or name)");
    app.add_flag("--json", options->json, "Print a JSON array");
    app.add_flag("-p,--progress", options->progress, "Show progress even if standard error is not a terminal");
    add_workers_option(app, options->workers);
}

}  // namespace tool
