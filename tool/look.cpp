// qcow ls, tree, find and cat: what is in the file systems of a disk.

#include <fmt/format.h>
#include <fnmatch.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <utility>

#include "command.h"
#include "inside.h"
#include "qcow/text.h"
#include "text.h"

namespace tool {
namespace {

struct LookOptions {
    DiskName disk;
    std::vector<std::string> paths;
    std::optional<std::uint64_t> inode;
    bool details = false;
    bool recursive = false;
    bool deleted = false;
    bool json = false;
    // find
    std::string name;
    std::string iname;
    std::string type;
    std::string size;
    std::string newer;
    std::string older;
};

/// The file that the command is about: that at the path, or the inode.
qcow::Result<qcow::Inode> start_of(Inside& inside, const LookOptions& options, const std::string& path, bool follow) {
    if (options.inode) return *options.inode;
    return find_shown_path(*inside.files, path, follow);
}

/// Counts errors of single files, and prints them.
class Failures {
public:
    explicit Failures(std::string top) : top_(std::move(top)) {}
    void operator()(const std::string& path, const qcow::Error& error) {
        ++count_;
        complain_about(path.empty() ? top_ : top_ + (top_.ends_with('/') ? "" : "/") + path, error);
    }
    [[nodiscard]] int status() const { return count_ == 0 ? ok : failed; }

private:
    std::string top_;
    std::size_t count_ = 0;
};

// ---- ls ----

struct Row {
    std::string name;
    qcow::FileInfo info;
    bool deleted = false;
    std::string target;
};

std::string shown_name(const Row& row) {
    auto name = qcow::printable(row.name);
    if (row.info.type == qcow::FileType::directory) name = paint(name, Colour::bold);
    if (row.deleted) name = paint(name, Colour::red) + " (deleted)";
    if (!row.target.empty()) name += " -> " + qcow::printable(row.target);
    return name;
}

std::string size_or_device(const qcow::FileInfo& info) {
    const bool device = info.type == qcow::FileType::character_device || info.type == qcow::FileType::block_device;
    return device ? fmt::format("{}, {}", info.major, info.minor) : fmt::to_string(info.size);
}

void print_rows(const std::vector<Row>& rows, bool details) {
    if (!details) {
        for (const auto& row : rows) fmt::print("{}\n", shown_name(row));
        return;
    }
    using enum Table::Align;
    Table table({{"INODE", right},
                 {"MODE"},
                 {"LINKS", right},
                 {"USER", right},
                 {"GROUP", right},
                 {"SIZE", right},
                 {"MODIFIED"},
                 {"NAME"}});
    for (const auto& row : rows) {
        const auto& info = row.info;
        table.add({fmt::to_string(info.inode), mode_text(info), fmt::to_string(info.links), fmt::to_string(info.user),
                   fmt::to_string(info.group), size_or_device(info), time_text(info.modified), shown_name(row)});
    }
    if (!table.empty()) table.print();
}

qcow::Result<Row> row_of(qcow::FileSystem& files, const qcow::DirectoryEntry& entry) {
    Row row{entry.name, {}, entry.deleted, {}};
    auto info = files.stat(entry.inode);
    if (!info && !entry.deleted) return std::unexpected(std::move(info).error());
    if (info) row.info = *info;
    if (!info) row.info.inode = entry.inode;
    if (row.info.type == qcow::FileType::symbolic_link && !entry.deleted)
        row.target = files.read_link(entry.inode).value_or("");
    return row;
}

Json row_json(const Row& row, const std::string& path) {
    Json json;
    add_text(json, "path", path);
    add_text(json, "name", row.name);
    json.update(file_json(row.info));
    if (row.deleted) json["deleted"] = true;
    if (!row.target.empty()) add_text(json, "target", row.target);
    return json;
}

std::string joined(const std::string& above, const std::string& name) {
    if (name.empty()) return above;
    return above.ends_with('/') ? above + name : above + "/" + name;
}

qcow::Result<int> list_one(Inside& inside, const LookOptions& options, const std::string& path, Json& json) {
    auto& files = *inside.files;
    const auto start = QCOW_TRY(start_of(inside, options, path, true));
    if (options.paths.size() > 1 && !options.json) fmt::print("{}:\n", qcow::printable(path));
    Failures failures(path);
    const auto list_directory = [&](const std::string& below, qcow::Inode directory) -> qcow::Result<void> {
        std::vector<qcow::Error> refused;
        auto entries = QCOW_TRY(files.list(directory, options.deleted, &refused));
        // A walk says it, too.
        if (!options.recursive) {
            for (const auto& error : refused) failures(below, error);
        }
        std::ranges::sort(entries, {}, &qcow::DirectoryEntry::name);
        std::vector<Row> rows;
        for (const auto& entry : entries) {
            // Without details, the name is enough.
            if (!options.details && !options.json) {
                Row row{entry.name, {}, entry.deleted, {}};
                row.info.type = entry.type;
                rows.push_back(std::move(row));
                continue;
            }
            auto row = row_of(files, entry);
            if (row) {
                rows.push_back(*std::move(row));
            } else {
                failures(joined(below, entry.name), row.error());
            }
        }
        if (options.json) {
            for (const auto& row : rows) json.push_back(row_json(row, joined(joined(path, below), row.name)));
        } else {
            print_rows(rows, options.details);
        }
        return {};
    };
    const auto info = QCOW_TRY(files.stat(start));
    if (info.type != qcow::FileType::directory) {
        Row row{path, info, info.deleted, {}};
        if (options.json) json.push_back(row_json(row, path));
        if (!options.json) print_rows({row}, options.details);
        return ok;
    }
    if (!options.recursive) {
        QCOW_TRY_VOID(list_directory("", start));
        return failures.status();
    }
    bool first = true;
    qcow::WalkOptions walking;
    walking.failed = [&](const std::string& below, const qcow::Error& error) { failures(below, error); };
    QCOW_TRY_VOID(qcow::walk(files, start, walking, [&](const qcow::Visited& visited) -> qcow::Result<qcow::Descend> {
        if (visited.info.type != qcow::FileType::directory) return qcow::Descend::no;
        if (!options.json) fmt::print("{}{}:\n", first ? "" : "\n", qcow::printable(joined(path, visited.path)));
        first = false;
        // If it cannot be listed, the walk says so.
        static_cast<void>(list_directory(visited.path, visited.entry.inode));
        return qcow::Descend::yes;
    }));
    return failures.status();
}

qcow::Result<int> run_ls(const LookOptions& options) {
    auto inside = QCOW_TRY(open_inside(options.disk));
    Json json = Json::array();
    int status = ok;
    auto paths = options.paths;
    if (paths.empty()) paths.emplace_back("/");
    for (const auto& path : paths) {
        const auto listed = list_one(inside, options, path, json);
        if (!listed) complain(listed.error().message());
        status = std::max(status, listed.value_or(failed));
    }
    if (options.json) print_json(json);
    return status;
}

// ---- tree ----

qcow::Result<int> run_tree(const LookOptions& options) {
    auto inside = QCOW_TRY(open_inside(options.disk));
    const auto path = options.paths.empty() ? "/" : options.paths.front();
    const auto start = QCOW_TRY(start_of(inside, options, path, true));
    Failures failures(path);
    qcow::WalkOptions walking;
    walking.deleted = options.deleted;
    walking.failed = [&](const std::string& below, const qcow::Error& error) { failures(below, error); };
    Json json = Json::array();
    std::uint64_t directories = 0;
    std::uint64_t others = 0;
    QCOW_TRY_VOID(
        qcow::walk(*inside.files, start, walking, [&](const qcow::Visited& visited) -> qcow::Result<qcow::Descend> {
            Row row{visited.depth == 0 ? path : visited.entry.name, visited.info, visited.entry.deleted, {}};
            if (row.info.type == qcow::FileType::symbolic_link && !row.deleted)
                row.target = inside.files->read_link(visited.entry.inode).value_or("");
            if (options.json) {
                json.push_back(row_json(row, joined(path, visited.path)));
            } else {
                fmt::print("{:{}}{}\n", "", std::size_t{visited.depth} * 4, shown_name(row));
            }
            if (visited.depth > 0) ++(row.info.type == qcow::FileType::directory ? directories : others);
            return qcow::Descend::yes;
        }));
    if (options.json) print_json(json);
    if (!options.json) fmt::print("\n{} directories, {} files\n", directories, others);
    return failures.status();
}

// ---- find ----

/// "+10M": larger; "-10M": smaller; "10M": exactly.
bool has_size(std::uint64_t size, const std::string& wanted) {
    const bool signs = wanted.starts_with('+') || wanted.starts_with('-');
    const auto bound = parse_size(signs ? wanted.substr(1) : wanted);
    if (wanted.starts_with('+')) return size > bound;
    if (wanted.starts_with('-')) return size < bound;
    return size == bound;
}

const CLI::Validator compared_size(
    [](std::string& text) {
        auto number = text;
        if (number.starts_with('+') || number.starts_with('-')) number.erase(0, 1);
        return size_text(number);
    },
    "");

/// "2026-01-31" or "2026-01-31 12:00:00", in local time, or with a "Z" behind in UTC; "@" and the seconds since 1970.
std::optional<std::int64_t> parse_time(const std::string& text) {
    if (text.starts_with('@')) {
        std::int64_t seconds = 0;
        const auto [end, error] = std::from_chars(text.data() + 1, text.data() + text.size(), seconds);
        return error == std::errc() && end == text.data() + text.size() ? std::optional(seconds) : std::nullopt;
    }
    std::tm time = {};
    time.tm_isdst = -1;
    const auto* rest = strptime(text.c_str(), "%Y-%m-%d", &time);
    if (rest != nullptr && (*rest == ' ' || *rest == 'T')) rest = strptime(rest + 1, "%H:%M:%S", &time);
    if (rest == nullptr) return {};
    if (std::string_view(rest) == "Z") return timegm(&time);
    return *rest == '\0' ? std::optional<std::int64_t>(std::mktime(&time)) : std::nullopt;
}

const CLI::Validator time_value(
    [](std::string& text) {
        return parse_time(text) ? std::string()
                                : "\"" + text +
                                      "\" is no time; write 2026-01-31, \"2026-01-31 12:00:00\", 2026-01-31T12:00:00Z "
                                      "or @1769860800";
    },
    "");

char letter_of(qcow::FileType type) {
    constexpr std::string_view letters = "?fdlcbps";
    return letters.at(static_cast<std::size_t>(type));
}

bool matches(const qcow::Visited& visited, const std::string& name, const LookOptions& options) {
    const auto& info = visited.info;
    if (!options.name.empty() && fnmatch(options.name.c_str(), name.c_str(), 0) != 0) return false;
    if (!options.iname.empty() && fnmatch(options.iname.c_str(), name.c_str(), FNM_CASEFOLD) != 0) return false;
    if (!options.type.empty() && letter_of(info.type) != options.type.front()) return false;
    if (!options.size.empty() && !has_size(info.size, options.size)) return false;
    if (!options.newer.empty() && (!info.modified || info.modified->seconds <= *parse_time(options.newer)))
        return false;
    return options.older.empty() || (info.modified && info.modified->seconds < *parse_time(options.older));
}

qcow::Result<int> run_find(const LookOptions& options) {
    auto inside = QCOW_TRY(open_inside(options.disk));
    const auto path = options.paths.empty() ? "/" : options.paths.front();
    const auto start = QCOW_TRY(find_shown_path(*inside.files, path, false));
    Failures failures(path);
    qcow::WalkOptions walking;
    walking.deleted = options.deleted;
    walking.failed = [&](const std::string& below, const qcow::Error& error) { failures(below, error); };
    Json json = Json::array();
    QCOW_TRY_VOID(
        qcow::walk(*inside.files, start, walking, [&](const qcow::Visited& visited) -> qcow::Result<qcow::Descend> {
            const auto name = visited.depth == 0 ? path.substr(path.rfind('/') + 1) : visited.entry.name;
            if (!matches(visited, name, options)) return qcow::Descend::yes;
            const Row row{name, visited.info, visited.entry.deleted, {}};
            const auto whole = joined(path, visited.path);
            if (options.json) {
                json.push_back(row_json(row, whole));
            } else {
                fmt::print("{}{}\n", qcow::printable(whole), row.deleted ? " (deleted)" : "");
            }
            return qcow::Descend::yes;
        }));
    if (options.json) print_json(json);
    return failures.status();
}

// ---- cat ----

qcow::Result<int> run_cat(const LookOptions& options) {
    auto inside = QCOW_TRY(open_inside(options.disk));
    qcow::FilesInUse in_use;
    using enum qcow::FilesInUse::Use;
    QCOW_TRY_VOID(in_use.add(read, *inside.image, QCOW_TRY(spec_of(options.disk.source)), "the image"));
    QCOW_TRY_VOID(in_use.add(written, "/dev/stdout", "standard output"));
    bool output_failed = false;
    const auto print = [&](std::span<const std::byte> bytes) -> qcow::Result<void> {
        while (!bytes.empty()) {
            const auto done = write(STDOUT_FILENO, bytes.data(), bytes.size());
            if (done < 0 && errno == EINTR) continue;
            if (done < 0) {
                output_failed = true;
                return std::unexpected(qcow::Error{qcow::Errc::io, "standard output", std::strerror(errno)});
            }
            bytes = bytes.subspan(static_cast<std::size_t>(done));
        }
        return {};
    };
    auto paths = options.paths;
    if (options.inode) paths.emplace_back();
    if (paths.empty()) {
        return std::unexpected(
            qcow::Error{qcow::Errc::invalid_argument, "cat", "name a file in the disk, or give --inode"});
    }
    int status = ok;
    for (const auto& path : paths) {
        const auto done = [&]() -> qcow::Result<void> {
            const auto inode = path.empty() ? *options.inode : QCOW_TRY(find_shown_path(*inside.files, path));
            const auto place = path.empty() ? fmt::format("inode {}", inode) : qcow::printable(path);
            const auto type = QCOW_TRY(inside.files->stat(inode)).type;
            if (type == qcow::FileType::directory)
                return std::unexpected(qcow::Error{qcow::Errc::invalid_argument, place, "this is a directory"});
            auto read = qcow::read_contents(*inside.files, inode, inside.disk.get(), 0, print);
            if (!read) return std::unexpected(std::move(read).error().in(place));
            return {};
        }();
        if (done) continue;
        if (output_failed) return std::unexpected(done.error());
        complain(done.error().message());
        status = failed;
    }
    return status;
}

void add_common(CLI::App& app, LookOptions& options, const std::string& paths, bool several,
                const std::string& snapshot = "-l,--snapshot") {
    add_disk_options(app, options.disk, snapshot);
    add_checksum_option(app, options.disk);
    auto* option = app.add_option("PATH", options.paths, paths);
    if (!several) option->expected(0, 1);
    if (several) option->expected(0, -1);
}

void add_inode(CLI::App& app, LookOptions& options) {
    app.add_option("--inode", options.inode, "Take the file with this inode number instead of a path")
        ->type_name("NUMBER");
}

}  // namespace

void declare_ls(CLI::App& root, int& status) {
    const auto options = std::make_shared<LookOptions>();
    auto& app = declare(root, status, "ls", "List directories in the file system of a disk",
                        "Needs no mounting and no root. A process without rights reads the file system.\n"
                        "Examples:\n"
                        "  qcow ls disk.qcow2 /etc             the only file system of the disk\n"
                        "  qcow ls -l disk.qcow2:2 /           partition 2, with modes, owners, sizes and times\n"
                        "  qcow ls --deleted disk.qcow2:2 /    also what was deleted, as far as it shows",
                        [options] { return run_ls(*options); });
    add_common(app, *options, "Directories or files in the disk (default: /)", true, "--snapshot");
    app.add_flag("-l,--long", options->details, "Show inodes, modes, owners, sizes and times");
    app.add_flag("-R,--recursive", options->recursive, "Also list the directories below");
    app.add_flag("--deleted", options->deleted, "Also show deleted entries");
    app.add_flag("--json", options->json, "Print a JSON array");
    add_inode(app, *options);
}

void declare_tree(CLI::App& root, int& status) {
    const auto options = std::make_shared<LookOptions>();
    auto& app = declare(root, status, "tree", "Show a directory of a disk, and all below it, as a tree",
                        "Examples:\n"
                        "  qcow tree disk.qcow2:2 /etc",
                        [options] { return run_tree(*options); });
    add_common(app, *options, "Directory in the disk (default: /)", false);
    app.add_flag("--deleted", options->deleted, "Also show deleted entries");
    app.add_flag("--json", options->json, "Print a JSON array");
    add_inode(app, *options);
}

void declare_find(CLI::App& root, int& status) {
    const auto options = std::make_shared<LookOptions>();
    auto& app = declare(root, status, "find", "Find files in the file system of a disk",
                        "Prints the paths of the files that all conditions hold for.\n"
                        "Examples:\n"
                        "  qcow find disk.qcow2:2 /etc --name '*.conf'\n"
                        "  qcow find disk.qcow2:2 --type f --size +100M\n"
                        "  qcow find disk.qcow2:2 /var --newer 2026-01-31",
                        [options] { return run_find(*options); });
    add_common(app, *options, "Directory in the disk (default: /)", false);
    app.add_option("--name", options->name, "Names that match this pattern (*, ?, [...])")->type_name("PATTERN");
    app.add_option("--iname", options->iname, "The same, whatever the case of letters")->type_name("PATTERN");
    one_of(app.add_option("--type", options->type,
                          "Regular file, directory, link, character or block device, pipe, socket"),
           {"f", "d", "l", "c", "b", "p", "s"});
    app.add_option("--size", options->size, "Files of this size; +SIZE: larger; -SIZE: smaller")
        ->type_name("SIZE")
        ->check(compared_size);
    app.add_option("--newer", options->newer,
                   "Files that were modified after this time: 2026-01-31, 2026-01-31T12:00:00Z or @SECONDS")
        ->type_name("TIME")
        ->check(time_value);
    app.add_option("--older", options->older, "Files that were modified before such a time")
        ->type_name("TIME")
        ->check(time_value);
    app.add_flag("--deleted", options->deleted, "Also find deleted entries");
    app.add_flag("--json", options->json, "Print a JSON array");
}

void declare_cat(CLI::App& root, int& status) {
    const auto options = std::make_shared<LookOptions>();
    auto& app = declare(root, status, "cat", "Print files of the file system of a disk",
                        "Links are followed within the disk.\n"
                        "Examples:\n"
                        "  qcow cat disk.qcow2:2 /etc/os-release\n"
                        "  qcow cat --inode 1234 disk.qcow2:2     a file that was deleted, as far as it is still there",
                        [options] { return run_cat(*options); });
    add_common(app, *options, "Files in the disk", true);
    add_inode(app, *options);
}

}  // namespace tool
