-- wrk: batches of keys, another one each time. Arguments: keys, ids, Accept.
-- wrk -t1 -c8 -d10 -s benchmarks/batch.lua http://127.0.0.1:8080/v1/user/batch -- 1000 100000 application/json
function init(args)
   local keys, ids = tonumber(args[1]), tonumber(args[2])
   math.randomseed(1)
   bodies, turn = {}, 0
   for i = 1, 200 do
      local named = {}
      for j = 1, keys do named[j] = string.format('"%d"', math.random(0, ids - 1)) end
      bodies[i] = '{"ids":[' .. table.concat(named, ",") .. ']}'
   end
   headers = { ["Accept"] = args[3], ["Content-Type"] = "application/json" }
end

function request()
   turn = turn % #bodies + 1
   return wrk.format("POST", nil, headers, bodies[turn])
end
